"""The build backend's part: compile the library of CPU operators into the wheel, or beside the sources of an editable
install; once for both. Without a compiler the wheel is pure, and engines for the CPU run the bodies in standard
operators.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CpuOperators(BuildHookInterface):
    """Compiles `plugins/*/cpu`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; `version` is `standard` or `editable`."""
        module = _compile_module(Path(self.root))
        try:
            library = module.compiled_library()
        except (RuntimeError, OSError) as error:
            self.app.display_warning(f"without the library of CPU operators: {error}")
            return
        if version != "editable":
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            build_data["artifacts"].append(f"/{library.relative_to(Path(self.root).resolve()).as_posix()}")


def _compile_module(root: Path) -> ModuleType:
    path = root / "plugins" / "seekforge" / "plugins" / "native" / "compile.py"
    spec = importlib.util.spec_from_file_location("seekforge_compile", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
