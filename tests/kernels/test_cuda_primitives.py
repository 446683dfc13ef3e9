"""The primitives of kernels/cuda, emulated and on a GPU: what the emulation of kernels rests on."""

import math

import numpy as np
import pytest
import torch
from qwen_runner.kernels.cuda_native import Gpu


def random_integers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def run(gpu: Gpu, name: str, output: torch.Tensor, *arguments: torch.Tensor | int | bool) -> torch.Tensor:
    """test_<name>(tensors' addresses, the output's address, the rest, stream), twice with the same result."""
    on_device = [gpu.tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    tensors = [gpu.ptr(a) for a in on_device if isinstance(a, torch.Tensor)]
    rest = [a for a in on_device if not isinstance(a, torch.Tensor)]
    results = []
    for _ in range(2):
        out = gpu.tensor(output)
        getattr(gpu.module, f"test_{name}")(*tensors, gpu.ptr(out), *rest, gpu.stream())
        gpu.synchronize()
        results.append(out.cpu())
    assert torch.equal(results[0], results[1])
    return results[0]


def nan(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"))


def minus_one(*shape: int) -> torch.Tensor:
    return torch.full(shape, -1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "depth", "dtype"), [("bf16", 16, torch.bfloat16), ("tf32", 8, torch.float32)]
)
def test_a_product_of_floats(
    gpu: Gpu, generator: torch.Generator, name: str, depth: int, dtype: torch.dtype
) -> None:
    a, b = (torch.randn(rows, depth, generator=generator).to(dtype) for rows in (16, 8))
    c = torch.randn(16, 8, generator=generator)
    exact_a, exact_b = a, b
    if dtype == torch.float32:
        exact_a, exact_b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    expected = c.double() + exact_a.double() @ exact_b.double().T
    torch.testing.assert_close(
        run(gpu, f"mma_{name}", nan(16, 8), a, b, c).double(), expected, rtol=1e-6, atol=1e-5
    )


def test_a_product_of_integers(gpu: Gpu, generator: torch.Generator) -> None:
    a, b = (torch.randint(-128, 128, (rows, 32), generator=generator).to(torch.int8) for rows in (16, 8))
    c = torch.randint(-1000, 1000, (16, 8), generator=generator).to(torch.int32)
    assert torch.equal(run(gpu, "mma_s8", minus_one(16, 8), a, b, c), c + a.int() @ b.int().T)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded_as_fragments(gpu: Gpu, transposed: bool) -> None:
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    actual = run(gpu, "load_matrix", minus_one(32, 4), matrices, transposed)
    oriented = matrices.mT if transposed else matrices
    # Lane 4 r + q holds columns 2q and 2q + 1 of row r.
    expected = oriented.reshape(4, 32, 2).transpose(0, 1).contiguous().view(torch.int32).squeeze(-1)
    assert torch.equal(actual, expected)


def test_shuffles(gpu: Gpu, generator: torch.Generator) -> None:
    values = torch.randint(-1000, 1000, (32,), generator=generator).to(torch.int32)
    lane = np.arange(32)
    sources = [
        np.full(32, 5),
        np.where(lane < 3, lane, lane - 3),
        np.where(lane + 3 > 31, lane, lane + 3),
        lane ^ 4,
    ]
    within = lane % 8
    sources += [
        lane // 8 * 8 + 5,
        np.where(within < 3, lane, lane - 3),
        np.where(within + 3 > 7, lane, lane + 3),
        lane ^ 4,
    ]
    rows = [values[source] for source in sources]
    odd = sum(1 << i for i in range(32) if values[i] % 2)
    rows.append(torch.full((32,), odd - (odd >> 31 << 32), dtype=torch.int32))
    rows.append(torch.stack([values[i % 2 :: 2].sum() for i in range(32)]).to(torch.int32))
    assert torch.equal(run(gpu, "shuffles", minus_one(10, 32), values), torch.stack(rows))


@pytest.mark.parametrize(("n", "valid"), [(4, 4), (4096, 4096), (1000, 504), (516, 0)])
def test_asynchronous_copies(gpu: Gpu, generator: torch.Generator, n: int, valid: int) -> None:
    values = torch.randn(n, generator=generator)
    expected = torch.where(torch.arange(n) < valid, values, 0)
    assert torch.equal(run(gpu, "copy_async", nan(n), values, n, valid, True), expected)


def test_what_is_used_before_its_copy_is_waited_for_is_nan(gpu: Gpu) -> None:
    if not gpu.emulated:
        pytest.skip("undefined on a GPU")
    assert run_unwaited(gpu).isnan().all()


def run_unwaited(gpu: Gpu) -> torch.Tensor:
    values, out = torch.ones(512), torch.zeros(512)
    gpu.module.test_copy_async(gpu.ptr(values), gpu.ptr(out), 512, 512, False, gpu.stream())
    return out


@pytest.mark.parametrize("n", [1, 256, 5000])
def test_the_last_block_sums_what_the_others_left(gpu: Gpu, n: int) -> None:
    values = gpu.tensor(torch.arange(n, dtype=torch.float32))
    partial = gpu.poisoned(-(-n // 256), dtype=torch.float32)
    counters = gpu.counters()
    for _ in range(2):
        out = gpu.poisoned(1, dtype=torch.float32)
        gpu.module.test_last_block_sum(
            gpu.ptr(values), gpu.ptr(partial), gpu.ptr(counters), gpu.ptr(out), n, gpu.stream()
        )
        gpu.synchronize()
        assert out.item() == n * (n - 1) // 2
        assert not counters.any()


def bits(a: int, b: int) -> list[int]:
    """What test_bits computes, in Python's integers."""
    bytes_ab = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    signed = [[x - (x >> 7 << 8) for x in word.to_bytes(4, "little")] for word in (a, b)]
    return [
        (a & b) ^ 0x43084308,
        bytes_ab[0] | bytes_ab[4] << 8 | bytes_ab[1] << 16 | bytes_ab[5] << 24,
        ((b << 32 | a) << 7) >> 32 & 0xFFFFFFFF,
        a * b >> 32,
        a.bit_count(),
        32 - a.bit_length(),
        (a & -a).bit_length(),
        int(f"{a:032b}"[::-1], 2),
        (1 + sum(x * y for x, y in zip(*signed, strict=True))) & 0xFFFFFFFF,
    ]


def test_bit_operations(gpu: Gpu, generator: torch.Generator) -> None:
    a, b = random_integers(generator, 200), random_integers(generator, 200)
    a[:3] = torch.tensor([0, 1, -1])
    actual = run(gpu, "bits", minus_one(9, 200), a, b, 200)
    words = zip(a.tolist(), b.tolist(), strict=True)
    expected = np.array([bits(x & 0xFFFFFFFF, y & 0xFFFFFFFF) for x, y in words], dtype=np.uint32).T
    assert np.array_equal(actual.numpy().view(np.uint32), expected)


FAULTS = {
    1: "ended without wait_for_previous_kernel",
    2: "1 of 64 threads ended, the others wait for what never comes: threads 0 to 6 at a block barrier,",
    3: "at __shfl_xor_sync",
    4: "__syncwarp",
    5: "wrote past its 64 bytes of dynamic shared memory",
}


def test_faults_of_a_kernel_are_errors_of_its_launch(gpu: Gpu, capfd: pytest.CaptureFixture[str]) -> None:
    if not gpu.emulated:
        pytest.skip("undefined on a GPU")
    out = minus_one(64)
    for fault, reason in FAULTS.items():
        with pytest.raises(RuntimeError, match="cudaErrorUnknown"):
            gpu.module.test_fault(fault, gpu.ptr(out), gpu.stream())
        assert reason in capfd.readouterr().err
    gpu.module.test_fault(0, gpu.ptr(out), gpu.stream())
    assert out.tolist() == [t ^ 1 for t in range(64)]


def run_clusters(gpu: Gpu, values: torch.Tensor, fault: int = 0) -> torch.Tensor:
    given, out = gpu.tensor(values), gpu.poisoned(*values.shape, dtype=torch.float32)
    gpu.module.test_cluster(gpu.ptr(given), gpu.ptr(out), *values.shape, fault, gpu.stream())
    gpu.synchronize()
    return out.cpu()


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("shape", [(3, 1, 32), (1, 2, 96), (4, 8, 64), (2, 4, 1024)])
def test_blocks_of_a_cluster_write_each_others_memory(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], order: str
) -> None:
    monkeypatch.setenv("QWEN_EMULATION_ORDER", order)
    if not gpu.emulated and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("a GPU without clusters")
    blocks = shape[1]
    values = torch.arange(math.prod(shape)).view(shape).float() % 1000
    ranks = torch.arange(blocks)
    factors = (1 + (ranks[:, None] + ranks) % blocks).float()  # [own rank, of block]
    expected = torch.einsum("ob,cbt->cot", factors, values.flip(2))
    assert torch.equal(run_clusters(gpu, values), expected)


CLUSTER_FAULTS = {
    1: "block (2, 0, 0): thread 1: cluster_arrive twice without cluster_wait",
    2: "the others wait for what never comes: threads 0 to 63 at a cluster's barrier; block (1, 0, 0): 0 of",
    3: "block (2, 0, 0): thread 1: of_block of a block that is not in the cluster",
}


def test_faults_of_a_cluster_are_errors_of_its_launch(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if not gpu.emulated:
        pytest.skip("undefined on a GPU")
    values = torch.ones(1, 3, 64)
    for fault, reason in CLUSTER_FAULTS.items():
        with pytest.raises(RuntimeError, match="cudaErrorUnknown"):
            run_clusters(gpu, values, fault)
        assert reason in capfd.readouterr().err
    run_clusters(gpu, values)
    with pytest.raises(RuntimeError, match="cudaErrorInvalidClusterSize"):
        run_clusters(gpu, torch.ones(1, 9, 64))
    monkeypatch.setenv("QWEN_EMULATED_CLUSTER", "1")
    with pytest.raises(RuntimeError, match="cudaErrorInvalidClusterSize"):
        run_clusters(gpu, values)
