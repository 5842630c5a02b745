"""How the verl plugin is loaded, waits for verl's modules, and stops a run where it could not be activated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from nvfp4_qat.integrations import verl as plugin  # noqa: E402
from nvfp4_qat.integrations.import_hooks import when_imported  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]  # verl's


def test_verl_has_loaded_the_plugin_by_itself() -> None:
    assert plugin.active() is None
    done = subprocess.run([sys.executable, "-m", "nvfp4_qat.integrations.verl"], capture_output=True, text=True)
    assert done.returncode == 0 and f"is active (nvfp4-qat {plugin._version('nvfp4-qat')}, verl" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "nvfp4_qat.integrations.verl"], capture_output=True, text=True,
        env={**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"},
    )  # fmt: skip
    assert done.returncode == 1 and "is not active: verl did not import it" in done.stderr


def test_actions_follow_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_to_hook.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []
    when_imported("module_to_hook", lambda module: seen.append(module.value))
    assert seen == []
    import module_to_hook  # type: ignore[import-not-found]

    assert seen == [1] and module_to_hook.__spec__.loader is module_to_hook.__loader__
    when_imported("module_to_hook", lambda module: seen.append(2))
    assert seen == [1, 2]


def test_code_that_runs_already_cannot_be_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = "from nvfp4_qat.integrations.import_hooks import when_imported\n"
    (tmp_path / "module_in_a_circle.py").write_text(hook + "when_imported(__name__, print)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="module_in_a_circle is being imported already"):
        import module_in_a_circle  # noqa: F401


FAILS = """
import sys
import nvfp4_qat.integrations as i
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "nvfp4_qat.integrations.verl_training":
            raise ImportError("libcudart is missing")
sys.meta_path.insert(0, Broken())
import verl
from verl.utils.qat.core import apply_qat
try:
    apply_qat(None, {"enable": True})
except RuntimeError as error:
    print("STOPPED", error)
"""


def test_a_plugin_that_could_not_be_activated_stops_whoever_uses_qat() -> None:
    done = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True)
    assert "could not be activated: ImportError: libcudart is missing" in done.stderr, done.stderr[-2000:]
    assert "STOPPED nvfp4-qat: QAT is enabled, but the verl plugin is not active in this process" in done.stdout
