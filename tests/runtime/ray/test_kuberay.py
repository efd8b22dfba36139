"""What KubeRay does with deploy/kuberay.yaml, but for Kubernetes: the Serve config is put to a head's dashboard, and a
machine's readiness is asked for."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.ray_served import ABSENT, PYTHON, running
from tests.support.replicas import completion, expected_texts, free_port, wait_until

from seekforge.runtime.ray.application import DEPLOYMENT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason=ABSENT)]
PROMPTS = [[5 + i, 9, 20 + 3 * i, 7] for i in range(4)]
#: Starts a head, puts a Serve config to its dashboard, and says so when all of it runs.
_HEAD = """
import json, signal, subprocess, sys, tempfile, time
from urllib.error import HTTPError
from urllib.request import Request, urlopen
config, port, dashboard, agent = sys.argv[1:]
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
words = ["--head", "--block", "--num-cpus", "4", "--port", port, "--dashboard-port", dashboard]
words += ["--dashboard-agent-listen-port", agent, "--min-worker-port", "0", "--max-worker-port", "0"]
folder = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)  # nobody else looks for a cluster there
words += ["--temp-dir", folder.name]
head = subprocess.Popen([sys.executable, "-m", "ray.scripts.scripts", "start", *words], stdout=sys.stderr)
address = f"http://127.0.0.1:{dashboard}/api/serve/applications/"
def asked(method, body=None):
    while True:
        try:
            request = Request(address, body, {"content-type": "application/json"}, method=method)
            return urlopen(request, timeout=60).read()
        except HTTPError as error:
            sys.exit(error.read().decode())
        except OSError:
            assert head.poll() is None, "the head ended"
            time.sleep(0.5)
try:
    body = open(config, "rb").read()
    asked("PUT", body)
    while any(one["status"] != "RUNNING" for one in json.loads(asked("GET"))["applications"].values()):
        time.sleep(0.5)
    print(json.dumps({"url": "http://127.0.0.1:%d" % json.loads(body)["http_options"]["port"]}), flush=True)
    signal.pause()
finally:
    head.terminate()
    head.wait(30)
    folder.cleanup()
"""


def test_the_serve_config_of_the_manifest_is_taken_and_its_probe_says_when_a_machine_is_ready(
    toy_engine: Path, tmp_path: Path
) -> None:
    manifest = yaml.safe_load((Path(__file__).parents[3] / "deploy/kuberay.yaml").read_text(encoding="utf-8"))
    port, ray_port, dashboard, agent = (free_port() for _ in range(4))
    config: dict[str, Any] = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    application["args"] |= {"engine": str(toy_engine), "kv_cache_memory": 1 << 22, "threads": 1}
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")

    (group,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    python, *words = container["readinessProbe"]["exec"]["command"]
    assert python == "python" and ":52365/" in words[1] and ":8000/" in words[1]
    words[1] = words[1].replace(":52365/", f":{agent}/").replace(":8000/", f":{port}/")

    said: list[str] = []

    def ready() -> bool:
        probed = subprocess.run([PYTHON, *words], stderr=subprocess.PIPE, text=True, check=False)
        said.append(probed.stderr)
        return probed.returncode == 0

    texts = expected_texts(toy_engine, PROMPTS)
    assert not ready(), "there is nothing yet"
    command = [PYTHON, "-c", _HEAD, str(path), *map(str, (ray_port, dashboard, agent))]
    with running(command, tmp_path) as served:
        wait_until(ready, 60, lambda: said[-1])
        (deployment,) = application["deployments"]
        assert deployment["name"] == DEPLOYMENT and len(served.replicas()) == deployment["num_replicas"]
        for prompt, text in zip(PROMPTS, texts, strict=True):
            assert completion(served.url, application["args"]["served_model_name"], prompt) == text
    assert not ready()
