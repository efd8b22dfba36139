"""DeepSeek-V3.2 as a compiled, versioned, checkable engine. The public names are in `seekforge.names`.

This file stands in each of the three source roots, word for word: whichever comes first on the path makes one package
of all three. The line that does it is spelt so that tools which read code without running it know it too.
"""

from typing import TYPE_CHECKING

__path__ = __import__("pkgutil").extend_path(__path__, __name__)
__spec__.submodule_search_locations = __path__  # what looks for packages by their specs finds all three too

from seekforge.names import __all__, __dir__, __getattr__  # noqa: E402, F401 - on the path that was extended

if TYPE_CHECKING:  # type checkers do not follow __getattr__
    from seekforge.names import *  # noqa: F403
