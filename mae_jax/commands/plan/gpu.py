"""GPU topologies for ahead-of-time compilation: properties of the cards, and XLA's descriptions of them.

JAX's CUDA plugin compiles for a described card on a machine without a GPU. A topology is named by the card and the
number of cards in one host, 1 to 8, as 'h200:8'.
"""

import importlib.util
import re
from typing import Any, NamedTuple

from mae_jax.commands.plan.tpu import quiet_stderr
from mae_jax.errors import UserError

MIB = 2**20
MOST = 8  # cards per host
# Autotuning cannot time kernels without a GPU, and Triton's matrix products do not compile without autotuning.
COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
# The fraction of a card's memory that JAX preallocates by default (docs.jax.dev, "GPU memory allocation";
# XLA_PYTHON_CLIENT_MEM_FRACTION changes it), and the largest one that we advise.
TAKEN, TAKEABLE = 0.75, 0.95


class Card(NamedTuple):
    """One kind of GPU. Its peak in FLOP/s is in mae_jax.training.throughput.PEAKS.

    Attributes:
      name: JAX's device kind.
      hbm: bytes of memory, as CUDA reports them.
      hbm_rate: memory bandwidth in bytes per second, by the datasheet.
      link_rate: bytes per second to other cards of the host, one way, by the datasheet.
      link: name of these links.
      capability: CUDA compute capability.
      description: fields of XLA's GpuDeviceInfoProto that differ between cards.
      copied: bytes per second that a copy reads and writes, measured; None: not measured.
      products: FLOP/s of large matrix products in bfloat16, measured; None: not measured.
    """

    name: str
    hbm: int
    hbm_rate: float
    link_rate: float
    link: str
    capability: tuple[int, int]
    description: dict[str, float]
    copied: float | None = None
    products: float | None = None


def _description(cores: int, units: int, shared_kib: int, threads: int, l2_mib: int, ghz: float) -> dict[str, float]:
    """Returns the fields of XLA's GpuDeviceInfoProto that differ between cards.

    Args:
      cores: streaming multiprocessors.
      units: float32 units of each.
      shared_kib: shared memory of each, in KiB.
      threads: threads of each.
      l2_mib: L2 cache in MiB.
      ghz: clock rate in GHz.
    """
    return {"core_count": cores, "fpus_per_core": units, "shared_memory_per_core": shared_kib * 1024,
            "shared_memory_per_block_optin": (shared_kib - 1) * 1024, "threads_per_core_limit": threads,
            "l2_cache_size": l2_mib * MIB, "clock_rate_ghz": ghz}


# Bandwidths and links: NVIDIA's datasheets of A100 (SXM4), H100 and H200 (SXM5) and L4; NVLink's 600 and 900 GB/s and
# PCIe's 64 are both ways together. Memory as CUDA reports it; of an L4, as nvidia-smi does. The rest: CUDA programming
# guide, compute capabilities, and the architectures' white papers.
CARDS = {
    "a100-40": Card("NVIDIA A100-SXM4-40GB", 40370 * MIB, 1555e9, 300e9, "NVLink", (8, 0),
                    _description(108, 64, 164, 2048, 40, 1.41)),
    "a100-80": Card("NVIDIA A100-SXM4-80GB", 81158 * MIB, 2039e9, 300e9, "NVLink", (8, 0),
                    _description(108, 64, 164, 2048, 40, 1.41)),
    "h100": Card("NVIDIA H100 80GB HBM3", 81008 * MIB, 3352e9, 450e9, "NVLink", (9, 0),
                 _description(132, 128, 228, 2048, 50, 1.98), products=798e12),
    "h200": Card("NVIDIA H200", 143051 * MIB, 4800e9, 450e9, "NVLink", (9, 0),
                 _description(132, 128, 228, 2048, 50, 1.98), copied=4.3e12, products=790e12),
    "l4": Card("NVIDIA L4", 23034 * MIB, 300e9, 32e9, "PCIe", (8, 9),
               _description(58, 128, 100, 1536, 48, 2.04)),
}
# The fractions of the datasheet's bandwidth and peak that an H200 reaches, assumed for cards that were not measured.
COPIED_SHARE, PRODUCTS_SHARE = 4.3e12 / 4800e9, 790e12 / 989e12


def parse(name: str) -> tuple[Card, int] | None:
    """Returns the card and the number of cards of a name such as 'h200:8'; None if it names no known card.

    Raises:
      UserError: the number is not 1 to 8.
    """
    kind, colon, count = name.partition(":")
    if kind not in CARDS:
        return None
    if colon and not re.fullmatch(f"[1-{MOST}]", count):
        raise UserError(f"topology {name!r}: write the number of GPUs of one host, 1 to {MOST}, as {kind}:{MOST}")
    return CARDS[kind], int(count or 1)


def devices(name: str) -> list[Any]:
    """Returns the devices of a GPU topology, which need not be present, for a mesh to compile for.

    Raises:
      UserError: the CUDA plugin is missing, or it refuses the topology.
    """
    found = parse(name)
    assert found
    card, count = found
    if not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        raise UserError("planning for a GPU needs JAX's CUDA plugin, which has the compiler: pip install "
                        "'mae_jax[plan-gpu]'")
    from jax.experimental import topologies

    try:
        with quiet_stderr():
            return list(topologies.get_topology_desc(
                platform="cuda", target_config=target_config(card), topology=f"1x1x{count}").devices)
    except (RuntimeError, NotImplementedError) as error:  # a plug-in of another version than JAX
        raise UserError(f"JAX's CUDA plugin refuses the topology {name!r}: {str(error).splitlines()[0]}; it must "
                        "have the version of JAX; run: pip install 'mae_jax[plan-gpu]'") from None


def target_config(card: Card) -> str:
    """Returns XLA's description of a card, a GpuTargetConfigProto in text format."""
    fields = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 48 * 1024,
        "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 2**16 - 1, "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": int(card.hbm_rate), "device_memory_size": card.hbm,
        "registers_per_core_limit": 2**16, "registers_per_block_limit": 2**16, **card.description,
    }
    major, minor = card.capability
    lines = [*(f"{name}: {value}" for name, value in fields.items()),
             f"cuda_compute_capability {{ major: {major} minor: {minor} }}"]
    return "\n".join(["gpu_device_info {", *lines, "}", 'platform_name: "CUDA"',
                      "dnn_version_info { major: 9 minor: 12 }", "runtime_version { major: 12 minor: 9 }",
                      f'device_description_str: "{card.name}"'])


def rates(card: Card, peak: float) -> tuple[float, float, list[str]]:
    """Returns bytes per second, FLOP/s of products, and the names of those that were not measured on this card.

    `peak` is the card's peak in FLOP/s.
    """
    assumed = [what for what, measured in (("memory", card.copied), ("products", card.products)) if not measured]
    return card.copied or card.hbm_rate * COPIED_SHARE, card.products or peak * PRODUCTS_SHARE, assumed
