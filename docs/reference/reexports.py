"""For the reference: what a package only re-exports is shown where it is defined, and not twice."""

from typing import Any

import griffe


class Reexports(griffe.Extension):
    """Forgets the names that an `__init__.py` imports."""

    def on_module_members(self, *, mod: griffe.Module, **kwargs: Any) -> None:
        """Called when a module has been read."""
        if mod.is_init_module:
            for name in [name for name, member in mod.members.items() if member.is_alias]:
                mod.del_member(name)
