"""GPUs by name, with numbers from their makers' data sheets; we measured none of them."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """One GPU and its links.

    Attributes:
        title: Full name.
        memory: Bytes of memory. We read a data sheet's GB as GiB; drivers keep up to one GiB of them.
        tflops: Dense bfloat16 TFLOP/s with float32 accumulation.
        float32_tflops: Float32 TFLOP/s outside of tensor cores.
        bandwidth: GB/s of the memory.
        intra_node: GB/s from one GPU to the others of its node, in one direction.
        inter_node: GB/s from one GPU to other nodes, in one direction.
        source: Data sheets that have the numbers, and what we assume beside them.
    """

    title: str
    memory: int
    tflops: float
    float32_tflops: float
    bandwidth: float
    intra_node: float
    inter_node: float
    source: str


GPUS = {
    "h100": GPU(
        "NVIDIA H100 SXM 80GB", 80 * GIB, 989.4, 66.9, 3350, 450, 50,
        "datasheets: H100 SXM (NVLink 900 GB/s both ways), DGX H100 (a 400 Gb/s port a GPU)",
    ),
    "h100-pcie": GPU(
        "NVIDIA H100 PCIe 80GB", 80 * GIB, 756, 51.2, 2000, 64, 25,
        "datasheet: H100 PCIe (PCIe 5.0 x16, no NVLink bridge); a 200 Gb/s port a GPU is our assumption",
    ),
    "h200": GPU(
        "NVIDIA H200 SXM 141GB", 141 * GIB, 989.4, 66.9, 4800, 450, 50,
        "datasheets: H200 SXM (NVLink 900 GB/s both ways), DGX H200 (a 400 Gb/s port a GPU)",
    ),
    "b200": GPU(
        "NVIDIA B200 180GB", 180 * GIB, 2250, 80, 8000, 900, 50,
        "datasheets: HGX B200 at 1000 W, DGX B200, an eighth of it (NVLink 1.8 TB/s both ways, a 400 Gb/s port a GPU)",
    ),
    "a100": GPU(
        "NVIDIA A100 SXM 80GB", 80 * GIB, 312, 19.5, 2039, 300, 25,
        "datasheets: A100 80GB SXM (NVLink 600 GB/s both ways), DGX A100 (a 200 Gb/s port a GPU)",
    ),
    "a100-40gb": GPU(
        "NVIDIA A100 SXM 40GB", 40 * GIB, 312, 19.5, 1555, 300, 25,
        "datasheets: A100 40GB SXM (NVLink 600 GB/s both ways), DGX A100 (a 200 Gb/s port a GPU)",
    ),
    "l40s": GPU(
        "NVIDIA L40S 48GB", 48 * GIB, 362, 91.6, 864, 32, 12.5,
        "datasheet: L40S (PCIe 4.0 x16); a 100 Gb/s port a GPU is our assumption",
    ),
}  # fmt: skip
"""GPUs that a plan can be made for."""


def find_gpu(name: str) -> GPU:
    """Finds a GPU by its name in [`GPUS`], in any case.

    Raises:
        ValueError: No GPU has this name.
    """
    if name.lower() not in GPUS:
        raise ValueError(f"`gpu={name}` is not known. Set one of: {', '.join(GPUS)}.")
    return GPUS[name.lower()]


def recognise_gpu(device_name: str) -> GPU | None:
    """Finds the GPU by the driver's name for it, such as `"NVIDIA H100 80GB HBM3"`; None if [`GPUS`] lacks it."""
    words = device_name.upper().replace("-", " ").split()
    names = {"L40S": "l40s", "B200": "b200", "H200": "h200", "H100": "h100", "A100": "a100"}
    found = next((name for word, name in names.items() if word in words), None)
    if found == "h100" and "PCIE" in words:
        found = "h100-pcie"
    if found == "a100" and "40GB" in words:
        found = "a100-40gb"
    return None if found is None else GPUS[found]
