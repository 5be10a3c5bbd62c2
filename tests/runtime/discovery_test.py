"""Which process this one is: from flags, srun's variables and a TPU VM's metadata."""

import http.server
import threading

import pytest

from mae_jax.errors import UserError
from mae_jax.runtime import discovery
from mae_jax.runtime.discovery import ProcessInfo

SLURM = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NODELIST": "gpu[003-005,011],login",
         "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "70000"}


def test_flags_say_it():
    assert discovery.find("10.0.0.1:7654", 4, 3, {}) == ProcessInfo("10.0.0.1", 7654, 3, 4)
    assert discovery.find("[fd00::2]:7654", 4, 3, {}) == ProcessInfo("fd00::2", 7654, 3, 4)
    assert discovery.find("auto", -1, -1, {}) is None
    assert discovery.find("off", -1, -1, SLURM) is None


@pytest.mark.parametrize(("flags", "line"), [
    (("auto", 2, 0), "--processes and --process .*--coordinator=HOST:PORT"),
    (("auto", -1, 0), "^--process .*--coordinator=HOST:PORT"),
    (("here", 2, 0), "--coordinator='here'.* HOST:PORT .*auto .*off"),
    (("here:port", 2, 0), "--coordinator='here:port'.* HOST:PORT"),
    (("here:99999", 2, 0), "--coordinator='here:99999'.* HOST:PORT"),
    (("::1:7654", 2, 0), "--coordinator='::1:7654'.*ADDRESS.*IPv6"),  # which part is the port?
    (("fd00::2", 2, 0), "--coordinator='fd00::2'"),
    (("[::1]", 2, 0), "--coordinator='.::1.'"),
    (("[::1]7654", 2, 0), "--coordinator='.::1.7654'"),
    (("[]:1", 2, 0), "--coordinator='..:1'"),
    (("[a::b::c]:1", 2, 0), "--coordinator='.a::b::c.:1'"),
    (("here:١٢", 2, 0), "--coordinator='here:١٢'"),
    (("here:1", 2, -1), "--processes=2 --process not given"),
    (("here:1", -1, 1), "--processes not given --process=1"),
    (("here:1", 2, 2), "--processes=2 --process=2"),
])
def test_flags_that_do_not_fit_get_one_line(flags, line):
    with pytest.raises(UserError, match=line) as error:
        discovery.find(*flags, {})
    assert "\n" not in str(error.value)


def test_tasks_of_srun_find_the_first_node_and_share_its_devices():
    assert discovery.find("auto", -1, -1, SLURM) == ProcessInfo("gpu003", 61440 + 70000 % 4096, 5, 8, (1,))
    for nodes, first in (("a1", "a1"), ("a1,b2", "a1"), ("n[7,9]", "n7"), ("x[01-02],y", "x01")):
        assert discovery.find("auto", -1, -1, SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator_host == first


def test_one_task_on_a_node_has_all_its_devices_and_so_has_one_that_slurm_shows_its_own_alone():
    assert discovery.find("auto", -1, -1, SLURM | {"SLURM_NTASKS": "4"}).local_device_ids is None
    assert discovery.find("auto", -1, -1, SLURM | {"CUDA_VISIBLE_DEVICES": "0"}).local_device_ids is None
    assert discovery.find("auto", -1, -1, SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}).local_device_ids == (1,)


def test_a_batch_script_and_a_single_task_run_alone():
    assert discovery.find("auto", -1, -1, {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}) is None
    assert discovery.find("auto", -1, -1, SLURM | {"SLURM_NTASKS": "1"}) is None


def test_tpu_hosts_come_from_the_environment_or_the_metadata_server(monkeypatch):
    several = {"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "1"}
    assert discovery.find("auto", -1, -1, several) == ProcessInfo("t-0", discovery.TPU_PORT, 1, 2)
    assert discovery.find("auto", -1, -1, several | {"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert discovery.find("auto", -1, -1, several | {"JAX_PLATFORMS": "cpu"}) is None

    sliced = several | {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2",
                        "MEGASCALE_COORDINATOR_ADDRESS": "first-0:8080"}
    assert discovery.find("auto", -1, -1, sliced) == ProcessInfo("first-0", discovery.TPU_PORT, 5, 6)
    one = sliced | {"TPU_WORKER_HOSTNAMES": "t-0", "TPU_WORKER_ID": "0"}  # slices of one host
    assert discovery.find("auto", -1, -1, one) == ProcessInfo("first-0", discovery.TPU_PORT, 2, 3)

    class Metadata(http.server.BaseHTTPRequestHandler):
        values = {"worker-network-endpoints": "a:0:10.1.0.4,b:1:10.1.0.5", "agent-worker-number": "1"}

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.values.get(self.path.rpartition("/")[2], "").encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        assert discovery.find("auto", -1, -1, where) is None  # without chips nobody is asked
        monkeypatch.setattr(discovery.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
        assert discovery.find("auto", -1, -1, where) == ProcessInfo("10.1.0.4", discovery.TPU_PORT, 1, 2)
        Metadata.values["tpu-env"] = ("TYPE: 'V5LITE_POD'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9:8080'\n"
                                      "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nZONE: 'z'\n")
        assert discovery.find("auto", -1, -1, where) == ProcessInfo("10.0.0.9", discovery.TPU_PORT, 3, 4)
        del Metadata.values["tpu-env"]
        Metadata.values["worker-network-endpoints"] = "a:0:10.1.0.4"
        assert discovery.find("auto", -1, -1, where) is None  # one host: nothing to wait for
        server.shutdown()
    assert discovery.find("auto", -1, -1, where) is None  # nobody answers


def test_the_cuda_plugin_is_told_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(discovery.os.path, "exists", lambda path: False)
    environ: dict[str, str] = {}
    discovery.quiet_cuda(environ)
    assert environ == {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    monkeypatch.setattr(discovery.os.path, "exists", lambda path: path == "/dev/nvidiactl")
    environ.clear()
    discovery.quiet_cuda(environ)
    assert environ == {}


@pytest.mark.parametrize("device", ["/dev/nvidia0", "/dev/kfd", "/dev/accel0", "/dev/vfio/1"])
def test_an_accelerator_is_known_before_jax_looks_for_it(monkeypatch, device):
    monkeypatch.setattr(discovery.os.path, "exists", lambda path: path == device)
    monkeypatch.setattr(discovery.glob, "glob", lambda pattern: [device] * (pattern[:8] == device[:8]))
    assert discovery.has_accelerator({})
    assert discovery.has_accelerator({"JAX_PLATFORMS": "cuda,cpu"})
    assert not discovery.has_accelerator({"JAX_PLATFORMS": "cpu"})
    monkeypatch.setattr(discovery.os.path, "exists", lambda path: False)
    monkeypatch.setattr(discovery.glob, "glob", lambda pattern: [])
    assert not discovery.has_accelerator({})
