"""Which process of how many this one is: as the flags say, or as Slurm or a TPU VM says."""

import glob
import ipaddress
import os
import re
import urllib.request
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from mae_jax.errors import UserError

TPU_PORT = 8476  # of process 0 on TPU VMs; our choice
METADATA_SECONDS = 2.0  # a machine that is no TPU VM has no metadata server
NVIDIA = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")  # where JAX looks for a GPU; the second in Docker, then in WSL2
METADATA = "http://{}/computeMetadata/v1/instance/attributes/{}"


class ProcessInfo(NamedTuple):
    """One process among several."""

    coordinator_host: str  # where process 0 runs
    coordinator_port: int
    process_id: int
    num_processes: int
    local_device_ids: tuple[int, ...] | None = None  # that it uses; None: all

    @property
    def address(self) -> str:
        """HOST:PORT of process 0."""
        return address(self.coordinator_host, self.coordinator_port)

    @property
    def numeric(self) -> bool:
        """Says whether process 0 is named by an IP address."""
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
    """Returns this process's place, None where it runs alone.

    Args:
      coordinator: HOST:PORT of process 0; 'off': alone, whatever the environment says; 'auto': several processes under
        `srun` with more than one task, and on a TPU VM of more than one host or slice, else alone.
      processes: how many, with HOST:PORT.
      process: the number of this one, from 0, with HOST:PORT.
      environ: the environment variables.

    Raises:
      UserError: the flags do not fit together.
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
    if tasks < 2 or not nodes:  # without a node list this is the batch script, not a task of srun
        return None
    # 'node[001-015,020],other' → 'node001'
    first = re.sub(r"^([^\[,]*)\[(\w+).*", r"\1\2", nodes).split(",")[0]
    port = 61440 + int(environ.get("SLURM_JOB_ID", 0)) % 4096  # the same on all nodes, another for each job
    several = tasks > int(environ.get("SLURM_STEP_NUM_NODES", 1))
    # Several tasks on a node share its GPUs, one each, unless Slurm itself shows each task its own alone.
    alone = environ.get("CUDA_VISIBLE_DEVICES", "").isdecimal()
    devices = (int(environ["SLURM_LOCALID"]),) if several and not alone else None
    return ProcessInfo(first, port, int(environ["SLURM_PROCID"]), tasks, devices)


def _tpu(environ: Mapping[str, str]) -> ProcessInfo | None:
    """Asks what GKE says in the environment, or the metadata server of a machine that has TPU chips.

    Of several slices, which are alike, the processes are numbered slice by slice.
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
    # It names the first process of the first slice; its port is that of libtpu.
    first = several.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0] if slices > 1 else ""
    return ProcessInfo(first or names[0], TPU_PORT, own * len(names) + int(number), slices * len(names))


def quiet_libtpu(environ: MutableMapping[str, str]) -> None:
    """Tells libtpu, where there is no TPU, what it would miss: it writes that to standard error, whatever one sets.

    Called before the devices are looked for. It finds none all the same.
    """
    if not _chips():
        environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def quiet_cuda(environ: MutableMapping[str, str]) -> None:
    """Has JAX's CUDA plugin, where it is installed and no NVIDIA GPU is, not complain with a traceback that none is.

    Called before the devices are looked for. It finds none all the same.
    """
    if not any(map(os.path.exists, NVIDIA)):
        environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def _chips() -> list[str]:
    return glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")


def _metadata(server: str, name: str) -> str:
    request = urllib.request.Request(METADATA.format(server, name), headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=METADATA_SECONDS) as reply:
            return reply.read().decode().strip()
    except OSError:
        return ""
