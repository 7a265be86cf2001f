"""The embedded Ray lets nobody in: it listens on loopback, with a token that its owner alone can read."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, psutil, ray
from raydist.cluster.connect import ray_session

@ray.remote(num_cpus=1)
class Worker:
    def node(self):
        return ray.util.get_node_ip_address()

with ray_session(2, 1):
    workers = [Worker.remote() for _ in range(2)]
    nodes = ray.get([worker.node.remote() for worker in workers])
    driver = psutil.Process()
    found = [
        (process.name(), each.laddr.ip)
        for process in (driver, *driver.children(recursive=True))
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN
    ]
print(json.dumps({"nodes": nodes, "listening": found}))
"""


def test_it_listens_on_loopback_with_a_token_of_its_owners(tmp_path: Path) -> None:
    """Also in a program that has imported Ray already, which reads the mode of its token then."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", f"import os; os.umask(0o022)\n{PROGRAM}"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["nodes"] == ["127.0.0.1"] * 2
    assert {"gcs_server", "raylet"} <= {name for name, _ in found["listening"]}
    addresses = {(name, ipaddress.ip_address(ip.removeprefix("::ffff:"))) for name, ip in found["listening"]}
    assert not {(name, str(ip)) for name, ip in addresses if not ip.is_loopback}
    token = tmp_path / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o777 == 0o700
