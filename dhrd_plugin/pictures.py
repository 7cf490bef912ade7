"""Pictures by matplotlib, which the extra ``report`` brings."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from dhrd_plugin.errors import UserError


def check_extra(key: str, *packages: str) -> None:
    """Refuse to go on without some packages of the extra ``report``; ``key`` is what needs them."""
    for name in packages:
        try:
            import_module(name)
        except ImportError as error:
            raise UserError(f"{key}: {error.name} is not installed; pip install 'dhrd-plugin[report]'") from None


@contextmanager
def drawing() -> Iterator[None]:
    """For as long as a figure is made and saved: a name may hold dollar signs, of which matplotlib makes formulas."""
    import matplotlib

    with matplotlib.rc_context({'text.parse_math': False}):
        yield
