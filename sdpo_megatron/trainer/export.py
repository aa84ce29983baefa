"""Writing the policy as a Hugging Face directory."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sdpo_megatron.files import follow_umask
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.models.weight_files import INDEX, weights_sha256
from sdpo_megatron.run_dir.export_record import exported_base, record_export
from sdpo_megatron.trainer.disk import together
from sdpo_megatron.trainer.hf_weights import stream_hf_weights
from sdpo_megatron.trainer.parallel import ParallelState

SETTINGS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.json"),
)
"""The files of a model's directory that belong to any model with its configuration and tokenizer."""
SHARD_BYTES = 2 * 2**30
"""Size from which on a file is closed; each pipeline stage has its own files and holds this much in memory."""


def export_hf(
    directory: Path,
    chunks: Sequence[nn.Module],
    shape: ModelShape,
    source: Path,
    parallel: ParallelState,
    *,
    steps: int,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `directory` anew, in one step: what was there before stays until everything is written.

    Every rank calls it. `chunks` are the rank's parts of the model, of the shape `shape`; config, tokenizer and chat
    template are copied from `source`, the Hugging Face directory that the model came from. `steps` is how many steps
    the weights were trained. Raises RunFailed, on all ranks, where the disk does not take it."""
    partial = directory.parent / f".{directory.name}.partial"

    def prepare() -> None:
        if parallel.is_main:
            # a crash may have left it behind
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write() -> list[dict[str, Any]]:
        written: list[dict[str, Any]] = []
        # its tensor-parallel ranks gather each tensor together
        if parallel.is_first_replica:
            problem = None
            stream = stream_hf_weights(chunks, shape, parallel)
            for file in _files(stream, shard_bytes, keep=parallel.leads_stage):
                name = f"stage-{parallel.pp_rank:03d}-{len(written):05d}.safetensors"
                sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in file.items()}
                written.append({"file": name, "sizes": sizes, "dtype": str(next(iter(file.values())).dtype)})
                try:
                    if problem is None:
                        _save(file, partial / name)
                except (OSError, SafetensorError) as error:
                    # raised after the stream: tensor-parallel ranks wait for this one until its end
                    problem = error
            if problem is not None:
                raise OSError(str(problem)) from problem
        return written

    def finish(stages: list[list[dict[str, Any]]]) -> None:
        if parallel.is_main:
            files = [file for stage in stages for file in stage]
            _name_files(partial, files)
            copy_settings(source, partial, files[0]["dtype"].removeprefix("torch."))
            record_export(partial, steps, exported_base(source) or weights_sha256(source))
            _publish(partial, directory)

    try:
        together(parallel, f"make {partial}", prepare)
        stages = parallel.gather(together(parallel, f"write {partial}", write))
        together(parallel, f"finish {directory}", lambda: finish(stages))
    finally:
        if parallel.is_main:
            # gone already when published
            shutil.rmtree(partial, ignore_errors=True)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors makes it readable for its owner alone
    follow_umask(path)


def _files(stream: Iterable[tuple[str, Tensor]], shard_bytes: int, keep: bool) -> Iterator[dict[str, Tensor]]:
    """The stream in portions of at least `shard_bytes`, on the CPU; with `keep` false it is only run through."""
    portion: dict[str, Tensor] = {}
    size = 0
    for name, tensor in stream:
        if not keep:
            continue
        portion[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= shard_bytes:
            yield portion
            portion, size = {}, 0
    if portion:
        yield portion


def _name_files(partial: Path, files: list[dict[str, Any]]) -> None:
    if len(files) == 1:
        (partial / files[0]["file"]).rename(partial / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (partial / file["file"]).rename(partial / name)
        weight_map.update(dict.fromkeys(file["sizes"], name))
    total = sum(size for file in files for size in file["sizes"].values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (partial / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def copy_settings(source: Path, target: Path, dtype: str | None) -> None:
    """Copies everything of a Hugging Face directory but weights; with `dtype`, config.json says that the weights are of
    that type."""
    for path in source.iterdir():
        if path.name in SETTINGS or path.suffix == ".jinja":
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _publish(partial: Path, directory: Path) -> None:
    old = directory.parent / f".{directory.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
