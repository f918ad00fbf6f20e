"""Compiles what the agent imports. Not imported: run by the *guest's* interpreter, which alone knows both answers.

    python3.11 -ISE python_closure.py OUTPUT STANDARD_LIBRARY OURS MODULE...

Imports the modules, looks which files the interpreter has read, and writes each below OUTPUT, compiled, at the path that
it gets in the guest. A ``.pyc`` is never compared with a source that is not there (PEP 552, unchecked hash).

Uses built-in modules only, so that it does not find itself among what it looks for.
"""

import _frozen_importlib_external as importer  # what importlib.util would hand on, without its imports
import _imp
import posix
import sys

GUEST_STANDARD_LIBRARY = "/usr/lib/python3.11"
GUEST_OURS = "/usr/lib/kata-agent"


def main(output: str, standard_library: str, ours: str, *modules: str) -> None:
    """Do what the module says."""
    places = {standard_library: GUEST_STANDARD_LIBRARY, ours: GUEST_OURS}  # the first may be below the second
    sys.path[:] = [*places, f"{standard_library}/lib-dynload"]
    sys.dont_write_bytecode = True
    for module in modules:
        __import__(module)
    imported = [module.__spec__ for module in sys.modules.values() if getattr(module, "__spec__", None)]
    for spec in imported:
        if spec.has_location and spec.origin:
            place = next(place for place in places if spec.origin.startswith(f"{place}/"))
            write(output, spec.origin, places[place] + spec.origin[len(place) :])


def write(output: str, source: str, target: str) -> None:
    """Write one module to where the guest will look for it."""
    with open(source, "rb") as file:
        data = file.read()
    if source.endswith(".py"):
        code = compile(data, target, "exec", dont_inherit=True, optimize=2)
        digest = _imp.source_hash(importer._RAW_MAGIC_NUMBER, data)
        data = importer._code_to_hash_pyc(code, digest, False)
        target += "c"
    path = output
    for part in target.strip("/").split("/"):
        try:
            posix.mkdir(path)
        except FileExistsError:
            pass
        path += f"/{part}"
    with open(path, "wb") as file:
        file.write(data)


main(*sys.argv[1:])
