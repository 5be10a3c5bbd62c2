"""Detects the process id, the number of processes and the coordinator from flags, Slurm or the metadata of a TPU VM."""

import glob
import ipaddress
import os
import re
import urllib.request
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from mae_jax.errors import UserError

TPU_PORT = 8476  # port of process 0 on TPU VMs (our choice)
METADATA_SECONDS = 2.0  # timeout of the metadata server, which exists on TPU VMs only
NVIDIA = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")  # where JAX looks for a GPU: on a host, in Docker, in WSL2
AMD = "/dev/kfd"
METADATA = "http://{}/computeMetadata/v1/instance/attributes/{}"


class ProcessInfo(NamedTuple):
    """One process of a run with several."""

    coordinator_host: str  # of process 0
    coordinator_port: int
    process_id: int
    num_processes: int
    local_device_ids: tuple[int, ...] | None = None  # devices that this process uses; None: all

    @property
    def address(self) -> str:
        """HOST:PORT of process 0."""
        return address(self.coordinator_host, self.coordinator_port)

    @property
    def numeric(self) -> bool:
        """Whether the coordinator's host is an IP address."""
        return _numeric(self.coordinator_host)


def address(host: str, port: int) -> str:
    """Returns HOST:PORT, or [HOST]:PORT for an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _numeric(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def find(coordinator: str, processes: int, process: int, environ: Mapping[str, str] = os.environ) -> ProcessInfo | None:
    """Returns this process among several, or None for a single process.

    Args:
      coordinator: HOST:PORT of process 0; 'off': a single process in any environment; 'auto': several processes under
        `srun` with more than one task and on TPU VMs with more than one host or slice, else a single process.
      processes: number of processes, with HOST:PORT; -1: not given.
      process: index of this process, from 0, with HOST:PORT; -1: not given.
      environ: the environment variables.

    Raises:
      UserError: the flags are invalid or do not fit together.
    """
    given = [name for name, value in (("--processes", processes), ("--process", process)) if value >= 0]
    if coordinator in ("auto", "off"):
        if given:
            raise UserError(f"{' and '.join(given)} needs --coordinator=HOST:PORT, the address of process 0")
        return (_slurm(environ) or _tpu(environ)) if coordinator == "auto" else None
    host, _, port = coordinator.rpartition(":")
    host, bare = re.sub(r"^\[(.*)\]$", r"\1", host), host
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536 or (
            ":" in host and (host == bare or not _numeric(host))):
        raise UserError(f"--coordinator={coordinator!r}; expected HOST:PORT of process 0, [ADDRESS]:PORT for an IPv6 "
                        "address, auto or off")
    if processes < 1 or not 0 <= process < processes:
        raise UserError(f"--coordinator={coordinator} with --processes={processes} --process={process}; expected how "
                        "many processes there are, at least 1, and the number of this one, from 0 to one less"
                        .replace("=-1", " not given"))
    return ProcessInfo(host, int(port), process, processes)


def _slurm(environ: Mapping[str, str]) -> ProcessInfo | None:
    tasks, nodes = int(environ.get("SLURM_NTASKS", 1)), environ.get("SLURM_STEP_NODELIST", "")
    if tasks < 2 or not nodes:  # the batch script has no node list, unlike a task of srun
        return None
    # 'node[001-015,020],other' → 'node001'
    first = re.sub(r"^([^\[,]*)\[(\w+).*", r"\1\2", nodes).split(",")[0]
    port = 61440 + int(environ.get("SLURM_JOB_ID", 0)) % 4096  # the same on all nodes, different for each job
    several = tasks > int(environ.get("SLURM_STEP_NUM_NODES", 1))
    # Several tasks on a node use one GPU each. If Slurm shows each task only its own GPU, no choice is needed.
    alone = environ.get("CUDA_VISIBLE_DEVICES", "").isdecimal()
    devices = (int(environ["SLURM_LOCALID"]),) if several and not alone else None
    return ProcessInfo(first, port, int(environ["SLURM_PROCID"]), tasks, devices)


def _tpu(environ: Mapping[str, str]) -> ProcessInfo | None:
    """Reads GKE's environment variables, or on a machine with TPU chips its metadata server.

    With several slices, which must be of equal size, processes are numbered slice by slice.
    """
    if (environ.get("JAX_PLATFORMS") or "tpu").split(",")[0] != "tpu":
        return None
    hosts, number, several = environ.get("TPU_WORKER_HOSTNAMES", ""), environ.get("TPU_WORKER_ID", ""), dict(environ)
    if not hosts and _chips() and "TPU_SKIP_MDS_QUERY" not in environ:
        server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
        hosts, number = (_metadata(server, name) for name in ("worker-network-endpoints", "agent-worker-number"))
        # Lines such as "MEGASCALE_NUM_SLICES: '2'".
        several = dict(re.findall(r"^\s*(\w+):\s*'?([^'\n]*)", _metadata(server, "tpu-env"), re.MULTILINE)) | several
    # One of 'host', 'name:number:address'.
    names = [host.split(":")[-1] for host in hosts.split(",") if host]
    slices, own = int(several.get("MEGASCALE_NUM_SLICES") or 1), int(several.get("MEGASCALE_SLICE_ID") or 0)
    if (slices == 1 and len(names) < 2) or not names or not number.isdecimal():
        return None
    # The address names the first process of the first slice; its port is libtpu's and is not used.
    first = several.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0] if slices > 1 else ""
    return ProcessInfo(first or names[0], TPU_PORT, own * len(names) + int(number), slices * len(names))


def quiet_libtpu(environ: MutableMapping[str, str]) -> None:
    """Keeps libtpu from writing warnings to standard error on machines without a TPU.

    It sets variables whose absence libtpu reports regardless of any log level. libtpu still finds no device. Call it
    before JAX looks for devices.
    """
    if not _chips():
        environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def quiet_cuda(environ: MutableMapping[str, str]) -> None:
    """Keeps JAX's CUDA plugin, if installed, from logging a traceback on machines without an NVIDIA GPU.

    The plugin still finds no device. Call it before JAX looks for devices.
    """
    if not any(map(os.path.exists, NVIDIA)):
        environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def has_accelerator(environ: Mapping[str, str]) -> bool:
    """Says whether JAX may find a GPU or a TPU, without asking it."""
    return environ.get("JAX_PLATFORMS") != "cpu" and bool(_chips() or any(map(os.path.exists, (*NVIDIA, AMD))))


def _chips() -> list[str]:
    return glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")


def _metadata(server: str, name: str) -> str:
    request = urllib.request.Request(METADATA.format(server, name), headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=METADATA_SECONDS) as reply:
            return reply.read().decode().strip()
    except OSError:
        return ""
