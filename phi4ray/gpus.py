"""The cards that are planned for: memory, bandwidth and arithmetic, with where each is from."""

from collections.abc import Mapping
from dataclasses import dataclass

from phi4ray.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One card. `total_gib` is what CUDA reports, below the name; the rest is the vendor's.

    Rates are dense, in 10^12 operations a second; `fp8_tflops` is None where the tensor cores have
    no FP8, and vLLM then multiplies FP8 weights in bf16.
    """

    title: str
    total_gib: float
    memory_bandwidth_tbps: float
    bf16_tflops: float
    fp8_tflops: float | None
    int8_tops: float

    @property
    def total_bytes(self) -> int:
        """Memory as PyTorch sees it."""
        return int(self.total_gib * GIB)


# total_gib: as PyTorch's out-of-memory messages give it; the lowest of what is commonly seen, for
# it differs by up to 0.3 GiB with driver and ECC (H200: 139.72 to 139.81, most often 139.80).
# Bandwidth and dense rates: NVIDIA's datasheets of H200, H100 (SXM, PCIe), A100 (SXM), A10, A10G
# (AWS's, with slower tensor cores), L4 and L40S, halved where they state sparse ones; the Ada
# architecture whitepaper for GeForce (fp32 accumulate). "rtx-N" stands for the GeForce of Ada with
# that memory.
GPUS: Mapping[str, Gpu] = {
    "h200": Gpu(
        title="H200 SXM 141 GB", total_gib=139.80, memory_bandwidth_tbps=4.8,
        bf16_tflops=989, fp8_tflops=1979, int8_tops=1979,
    ),
    "h100-80": Gpu(
        title="H100 SXM 80 GB", total_gib=79.11, memory_bandwidth_tbps=3.35,
        bf16_tflops=989, fp8_tflops=1979, int8_tops=1979,
    ),
    "h100-pcie-80": Gpu(
        title="H100 PCIe 80 GB", total_gib=79.10, memory_bandwidth_tbps=2.0,
        bf16_tflops=756, fp8_tflops=1513, int8_tops=1513,
    ),
    "a100-80": Gpu(
        title="A100 SXM 80 GB", total_gib=79.15, memory_bandwidth_tbps=2.039,
        bf16_tflops=312, fp8_tflops=None, int8_tops=624,
    ),
    "a100-40": Gpu(
        title="A100 SXM 40 GB", total_gib=39.39, memory_bandwidth_tbps=1.555,
        bf16_tflops=312, fp8_tflops=None, int8_tops=624,
    ),
    "l40s-48": Gpu(
        title="L40S 48 GB", total_gib=44.34, memory_bandwidth_tbps=0.864,
        bf16_tflops=362, fp8_tflops=733, int8_tops=733,
    ),
    "a10-24": Gpu(
        title="A10 24 GB", total_gib=22.07, memory_bandwidth_tbps=0.6,
        bf16_tflops=125, fp8_tflops=None, int8_tops=250,
    ),
    "a10g-24": Gpu(
        title="A10G 24 GB", total_gib=22.07, memory_bandwidth_tbps=0.6,
        bf16_tflops=70, fp8_tflops=None, int8_tops=140,
    ),
    "l4-24": Gpu(
        title="L4 24 GB", total_gib=22.03, memory_bandwidth_tbps=0.3,
        bf16_tflops=121, fp8_tflops=242, int8_tops=242,
    ),
    "rtx-24": Gpu(
        title="RTX 4090 24 GB", total_gib=23.52, memory_bandwidth_tbps=1.008,
        bf16_tflops=165, fp8_tflops=330, int8_tops=661,
    ),
    "rtx-16": Gpu(
        title="RTX 4080 16 GB", total_gib=15.46, memory_bandwidth_tbps=0.717,
        bf16_tflops=97, fp8_tflops=195, int8_tops=390,
    ),
    "rtx-12": Gpu(
        title="RTX 4070 12 GB", total_gib=11.49, memory_bandwidth_tbps=0.504,
        bf16_tflops=58, fp8_tflops=117, int8_tops=233,
    ),
}  # fmt: skip

_ALIASES: Mapping[str, str] = {
    "h100": "h100-80",
    "h100-sxm": "h100-80",
    "h100-pcie": "h100-pcie-80",
    "a100": "a100-80",
    "a100-40g": "a100-40",
    "a100-80g": "a100-80",
    "l40s": "l40s-48",
    "a10": "a10-24",
    "a10g": "a10g-24",
    "l4": "l4-24",
    "rtx-4090": "rtx-24",
    "rtx-4080": "rtx-16",
    "rtx-4070": "rtx-12",
}


def find_gpu(name: str) -> Gpu:
    """Look a card up by its key in `GPUS` or its common name, such as `h100` or `RTX 4090`.

    Raises:
        ConfigError: it is not in the catalogue.
    """
    key = _key(name)
    found = GPUS.get(_ALIASES.get(key, key))
    if found is None:
        raise ConfigError(f"GPU {name!r} is not known: use one of {', '.join((*GPUS, *_ALIASES))}")
    return found


def gpus_labelled(label: str) -> tuple[str, ...]:
    """Keys of the cards that Ray may mean by the label of a node; none that it does not know.

    Ray leaves the memory and the form out of the name: `A100` are those of 40 and of 80 GB.
    """
    key = _key(label)
    if several := tuple(name for name in GPUS if name.startswith(f"{key}-")):
        return several
    known = _ALIASES.get(key, key)
    return (known,) if known in GPUS else ()


def _key(name: str) -> str:
    return "-".join(name.casefold().replace("_", "-").split()).removeprefix("geforce-")
