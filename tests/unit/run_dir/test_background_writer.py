import threading
import time

from sdpo_megatron.run_dir.background_writer import BackgroundWriter


def test_it_writes_beside_in_order_with_one_waiting():
    done: list[int] = []
    go_on, third_was_put = threading.Event(), threading.Event()
    writer = BackgroundWriter(print)

    def put_three() -> None:
        writer.put("0", lambda: done.append(0) if go_on.wait(10) else None)
        writer.put("1", lambda: done.append(1))
        third_was_put.clear()
        writer.put("2", lambda: done.append(2))
        third_was_put.set()

    caller = threading.Thread(target=put_three)
    caller.start()
    # the first is being written, the second waits, and the third has to wait outside
    assert not third_was_put.wait(0.1) and done == []
    go_on.set()
    caller.join(10)
    writer.settle()
    assert done == [0, 1, 2] and third_was_put.is_set()


def test_settling_waits_for_what_is_being_written():
    done: list[str] = []
    writer = BackgroundWriter(done.append)
    writer.settle()
    writer.put("a", lambda: time.sleep(0.1) or done.append("a"))
    assert done == []
    writer.settle()
    assert done == ["a"]


def test_failures_in_a_row_are_one_warning_and_later_ones_are_tried():
    warnings: list[str] = []
    done: list[int] = []
    writer = BackgroundWriter(warnings.append)

    def fail() -> None:
        raise OSError(28, "No space\nleft")

    for write in (fail, fail, lambda: done.append(1), fail):
        writer.put("writing x", write)
    writer.settle()
    assert warnings == ["writing x failed (OSError: [Errno 28] No space left)"] * 2
    assert done == [1]


def test_nothing_is_kept_once_it_is_written():
    import weakref

    class Step:
        def write(self) -> None: ...

    step = Step()
    gone = weakref.ref(step)
    writer = BackgroundWriter(print)
    writer.put("x", step.write)
    del step
    writer.settle()
    assert gone() is None


def test_what_is_offered_never_blocks_and_lapses_where_another_one_waits():
    done: list[int] = []
    go_on, begun = threading.Event(), threading.Event()
    writer = BackgroundWriter(print)
    writer.put("0", lambda: begun.set() or (done.append(0) if go_on.wait(10) else None))
    assert begun.wait(10)
    began = time.monotonic()
    for number in (1, 2, 3):
        writer.offer(str(number), lambda number=number: done.append(number))
    assert time.monotonic() - began < 1
    go_on.set()
    writer.settle()
    assert done == [0, 1]
