"""Blocks that run together and hand each other words, emulated and on a GPU."""

import pytest
import torch
from qwen_runner.kernels.cuda_native import Gpu

OTHER_WORDS16 = 1000


def run_ring(
    gpu: Gpu, values: torch.Tensor, fault: int = 0, area: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """test_ring's out and other for values [blocks, threads, 4]."""
    blocks, threads, _ = values.shape
    on_device = gpu.tensor(values)
    if area is None:
        area = gpu.scratch(16 * (blocks - 1) * blocks * threads)
    other = gpu.tensor(torch.zeros(4 * OTHER_WORDS16, dtype=torch.int32))
    out = gpu.poisoned(*values.shape, dtype=torch.int32)
    gpu.module.test_ring(
        gpu.ptr(on_device),
        gpu.ptr(area),
        gpu.ptr(other),
        OTHER_WORDS16,
        gpu.ptr(out),
        blocks,
        threads,
        fault,
        gpu.stream(),
    )
    gpu.synchronize()
    return out.cpu(), other.cpu()


def ring_values(blocks: int, threads: int) -> torch.Tensor:
    return torch.arange(blocks * threads * 4, dtype=torch.int32).view(blocks, threads, 4)


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(("blocks", "threads"), [(1, 64), (3, 64), (5, 96), (2, 512)])
def test_blocks_hand_on_words_in_a_ring(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, blocks: int, threads: int, order: str
) -> None:
    monkeypatch.setenv("QWEN_EMULATION_ORDER", order)
    values = ring_values(blocks, threads)
    out, other = run_ring(gpu, values)
    assert torch.equal(out, values.sum(0, dtype=torch.int32).expand_as(out))
    assert (other == -1).all()


def test_words_of_every_type_are_handed_over(gpu: Gpu) -> None:
    words = torch.randint(0, 2**31 - 1, (16,), dtype=torch.int32)
    words[[1, 4, 10, 15]] = -1  # a NaN that would mean "not there yet"
    on_device, area, out = gpu.tensor(words), gpu.scratch(64), gpu.poisoned(16, dtype=torch.int32)
    gpu.module.test_words(gpu.ptr(on_device), gpu.ptr(area), gpu.ptr(out), gpu.stream())
    gpu.synchronize()
    assert torch.equal(out.cpu(), torch.where(words == -1, -2, words))


def test_a_grid_that_does_not_fit_is_an_error(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_EMULATED_MULTIPROCESSORS", "2")
    fit = gpu.module.test_ring_blocks(512)
    if gpu.emulated:
        assert fit == 2 * 2048 // 512
    assert gpu.module.test_ring_blocks(4096) == 0
    with pytest.raises(RuntimeError, match="cudaErrorCooperativeLaunchTooLarge"):
        gpu.module.test_ring(0, 0, 0, 0, 0, fit + 1, 512, 0, gpu.stream())
    out, _ = run_ring(gpu, ring_values(3, 64))
    assert (out == ring_values(3, 64).sum(0)).all()


FAULTS = {
    1: "0 of 64 threads ended, the others wait for what never comes: ",
    2: "block (2, 0, 0): 1 of 64 threads ended, the others wait for what never comes: thread 0 at ",
    3: "block (2, 0, 0): thread 1: publish of a word that is there already",
    4: "block (2, 0, 0): thread 1: clear_exchange before wait_for_previous_kernel()",
    5: "block (2, 0, 0): thread 1: await before wait_for_previous_kernel()",
    6: "0 of 64 threads ended, the others wait for what never comes: threads 0 to 63 at an exchange (0x",
}


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_faults_of_an_exchange_are_errors_of_its_launch(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], order: str
) -> None:
    if not gpu.emulated:
        pytest.skip("undefined on a GPU")
    monkeypatch.setenv("QWEN_EMULATION_ORDER", order)
    values = ring_values(3, 64)
    for fault, reason in FAULTS.items():
        with pytest.raises(RuntimeError, match="cudaErrorUnknown"):
            run_ring(gpu, values, fault)
        assert reason in capfd.readouterr().err
    run_ring(gpu, values)


def test_a_deadlock_names_who_waits(gpu: Gpu, capfd: pytest.CaptureFixture[str]) -> None:
    if not gpu.emulated:
        pytest.skip("undefined on a GPU")
    with pytest.raises(RuntimeError, match="cudaErrorUnknown"):
        run_ring(gpu, ring_values(3, 64), fault=1)
    # Thread 1 of block 2 publishes nothing; thread 1 of block 1 and its neighbour 37 before await it.
    reason = capfd.readouterr().err
    assert "thread 1 at an exchange (0x" in reason
    assert "thread 28 at an exchange (0x" in reason
    assert "at a block barrier" in reason


def test_an_area_that_was_not_cleared_is_an_error(gpu: Gpu, capfd: pytest.CaptureFixture[str]) -> None:
    if not gpu.emulated:
        pytest.skip("undefined on a GPU")
    area = gpu.scratch(16 * 2 * 3 * 64)
    run_ring(gpu, ring_values(3, 64), area=area)
    with pytest.raises(RuntimeError, match="cudaErrorUnknown"):
        run_ring(gpu, ring_values(3, 64), area=area)
    assert (
        "publish of a word that is there already: twice, or in an area not cleared" in capfd.readouterr().err
    )
