"""The embedded Ray lets nobody in: it listens on loopback, with a token that its owner alone can read.

Nor does it let in what lies in the working folder, except the modules that a job names.
"""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, psutil, ray, sys
from raydist.cluster.connect import ray_session
from raydist.job.functions import find_in, import_function, module_folders

@ray.remote(num_cpus=1)
class Worker:
    def node(self):
        return ray.util.get_node_ip_address()

    def imports(self, folders):
        import pandas
        find_in(folders)
        return import_function("mine:say", "train.hooks[0]")(), pandas.__file__, sys.path

with ray_session(2, 1):
    workers = [Worker.remote() for _ in range(2)]
    nodes = ray.get([worker.node.remote() for worker in workers])
    said, pandas, path = ray.get(workers[0].imports.remote(module_folders(["mine:say"])))
    driver = psutil.Process()
    found = [
        (process.name(), each.laddr.ip)
        for process in (driver, *driver.children(recursive=True))
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN
    ]
print(json.dumps({"nodes": nodes, "listening": found, "said": said, "pandas": pandas, "path": path}))
"""


def test_it_lets_nobody_in(tmp_path: Path) -> None:
    """Also in a program that has imported Ray already, which reads the mode of its token then.

    Its temporary folder is gone afterwards.
    """
    (tmp_path / "mine.py").write_text("def say(): return 'mine'")
    (tmp_path / "pandas.py").write_text("raise ImportError('of the working folder')")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="r") as place:  # tmp_path is too long for Ray's sockets
        environment = {**kept, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "TMPDIR": place}
        result = subprocess.run(
            [sys.executable, "-c", f"import os; os.umask(0o022)\n{PROGRAM}"],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            check=False,
        )
        assert not list(Path(place).glob("ray-*"))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["nodes"] == ["127.0.0.1"] * 2
    assert {"gcs_server", "raylet"} <= {name for name, _ in found["listening"]}
    addresses = {(name, ipaddress.ip_address(ip.removeprefix("::ffff:"))) for name, ip in found["listening"]}
    assert found["said"] == "mine" and "site-packages" in found["pandas"]
    assert str(tmp_path) not in found["path"]
    assert not {(name, str(ip)) for name, ip in addresses if not ip.is_loopback}
    token = tmp_path / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o777 == 0o700
