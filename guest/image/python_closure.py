"""Compiles what the agent imports. Not imported: run by the *guest's* interpreter, which alone knows both answers.

    python3.11 -ISE python_closure.py OUTPUT STANDARD_LIBRARY OURS MODULE...

Imports the modules, looks which files the interpreter has read, and writes each below OUTPUT, compiled, at the path
that it gets in the guest. A ``.pyc`` is never compared with a source that is not there (PEP 552, unchecked hash).
"""

import sys

GUEST_STANDARD_LIBRARY = "/usr/lib/python3.11"
GUEST_OURS = "/usr/lib/kata-agent"


def imported_files(standard_library: str, ours: str, modules: list[str]) -> dict[str, str]:
    """Return where each file that the modules' import reads will be in the guest."""
    places = {standard_library: GUEST_STANDARD_LIBRARY, ours: GUEST_OURS}  # the first may be below the second
    sys.path[:] = [*places, f"{standard_library}/lib-dynload"]
    for name in modules:
        __import__(name)
    files = {}
    for module in list(sys.modules.values()):
        spec = module.__spec__
        if spec is not None and spec.has_location and spec.origin is not None:
            place = next(place for place in places if spec.origin.startswith(f"{place}/"))
            files[spec.origin] = places[place] + spec.origin[len(place) :]
    return files


def install(output: str, files: dict[str, str]) -> None:
    """Write the files below a directory: Python compiled and without docstrings, libraries as they are."""
    # Imported here: these must not be found among what the agent imports.
    import py_compile
    import shutil
    from pathlib import Path

    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    for source, target in files.items():
        path = Path(output + target)
        path.parent.mkdir(parents=True, exist_ok=True)
        if source.endswith(".py"):
            py_compile.compile(source, f"{path}c", target, doraise=True, optimize=2, invalidation_mode=mode)
        else:
            shutil.copyfile(source, path)


def main(output: str, standard_library: str, ours: str, *modules: str) -> None:
    """Do what the module says."""
    sys.dont_write_bytecode = True
    install(output, imported_files(standard_library, ours, list(modules)))


if __name__ == "__main__":
    main(*sys.argv[1:])
