"""The matrix products of the way from hidden states to the loss, beside the rate of a large product.

A chunk of 1,024 rows, D 4,096: logits = hidden head^T; the hidden states' gradient = logits' gradient times head; the
head's gradient = its transpose times hidden states, in float32, added up."""

from collections.abc import Iterator

import torch

from sdpo_megatron.kernels.from_hidden import add_product_
from tools.gpu_check.machine import Machine, Row, attempt

CHUNK, HIDDEN, COLUMNS = 1024, 4096, (151_936, 18_992)


def run(machine: Machine) -> Iterator[Row]:
    rate = machine.matrix_rate()
    size = machine.pick(8192, 512)
    yield {"what": f"{size} x {size} x {size}, bfloat16", "TFLOP/s": rate / 1e12}
    for columns in machine.pick(COLUMNS, (1_024,)):
        for chunk in machine.pick((CHUNK, 4 * CHUNK), (16,)):
            yield from chunk_products(machine, chunk, machine.pick(HIDDEN, 64), columns, rate)
            machine.release()


def chunk_products(machine: Machine, chunk: int, hidden: int, columns: int, rate: float) -> Iterator[Row]:
    hidden_UD, head_VD, gradient_UV = (
        torch.randn(shape, device=machine.device).bfloat16()
        for shape in ((chunk, hidden), (columns, hidden), (chunk, columns))
    )
    total_VD = torch.zeros(columns, hidden, device=machine.device)
    products = {
        "logits": lambda: torch.nn.functional.linear(hidden_UD, head_VD),
        "hidden states' gradient": lambda: gradient_UV @ head_VD,
        "head's gradient": lambda: add_product_(total_VD, gradient_UV, hidden_UD),
    }
    for name, product in products.items():

        def measure(product=product) -> Row:
            seconds = machine.seconds(product)
            reached = 2 * chunk * hidden * columns / seconds
            return {
                "ms": 1e3 * seconds,
                "TFLOP/s": reached / 1e12,
                "of the large product's rate": reached / rate,
            }

        yield from attempt(f"{name}, {chunk} rows, {columns} columns", measure)
