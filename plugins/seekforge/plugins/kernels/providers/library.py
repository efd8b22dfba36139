"""The libraries whose headers kernels include: which versions will do, and where an installed one is. Imports none."""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

from seekforge.common.errors import EnvironmentFault
from seekforge.common.requirements import command, declared, fault, installed

_INCLUDE: Final = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.M)


@dataclass(frozen=True)
class Library:
    """A library of headers.

    Attributes:
        name: what the provider, the extra that has its package, and its module are called.
        package: its distribution.
        headers: folder of its own headers, below the module's folder.
        system: folders of headers of others that it brings, in the order of a search.
    """

    name: str
    package: str
    headers: str
    system: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """An installed library.

    Attributes:
        package, version: its distribution.
        headers: folder of its own headers.
        system: folders of headers of others.
    """

    package: str
    version: str
    headers: Path
    system: tuple[Path, ...]

    def text_digest(self, source: bytes) -> str:
        """Return the sha256 over all headers of its own that a source includes, directly or not, with their paths.

        Headers of others count by the version alone.
        """
        digest, seen = hashlib.sha256(), set()
        todo = _INCLUDE.findall(source)
        while todo:
            name = todo.pop().decode("utf-8", "replace")
            path = self.headers / name
            if name in seen or not path.is_file():
                continue
            seen.add(name)
            todo += sorted(_INCLUDE.findall(path.read_bytes()))
        for name in sorted(seen):
            digest.update(name.encode() + b"\0" + hashlib.sha256((self.headers / name).read_bytes()).digest())
        return digest.hexdigest()


#: Provider -> its library.
LIBRARIES: Final[dict[str, Library]] = {
    "flashinfer": Library(
        name="flashinfer",
        package="flashinfer-python",
        headers="data/include",
        system=("data/cccl/cub", "data/cccl/libcudacxx/include", "data/cccl/thrust"),
    ),
}


@functools.cache
def find(name: str) -> Found:
    """Return the installed library of a provider.

    Raises:
        EnvironmentFault: it is not installed, has another version than was tried, or lacks its headers.
    """
    library = LIBRARIES[name]
    version = installed(library.package)
    wanted = next((one for one in declared().get(name, ()) if one.name == library.package), None)
    wanted = wanted or Requirement(library.package)
    wrong = fault(wanted, version)
    if wrong or version is None:
        raise EnvironmentFault(
            f"{wrong}, and kernels of provider {name} include its headers; {command([wanted]) or wrong}"
        )
    spec = importlib.machinery.PathFinder.find_spec(library.name, sys.path)  # finds, runs nothing
    folders = [] if spec is None else [Path(one) for one in spec.submodule_search_locations or ()]
    for folder in folders:
        headers = folder / library.headers
        if headers.is_dir():
            system = tuple(folder / one for one in library.system if (folder / one).is_dir())
            return Found(library.package, version, headers, system)
    raise EnvironmentFault(
        f"{library.package} {version} has no folder {library.name}/{library.headers}; {command([wanted])}"
    )
