"""Compile the native library from ``kernels/native``: ``python -m zoo_kernels.build`` in a checkout, or from setup.py.

Every source in ``native/`` is compiled once for each instruction set of the platform, with that set's flags and with
``ZK_ISA`` naming it; ``native/common/`` once, for the baseline. Which one runs is chosen at run time. The library links
neither torch nor Python, so it serves every version of both. Needs setuptools, which knows the platform's C++ compiler
(GCC, Clang or MSVC; the environment variables CXX, CXXFLAGS and LDFLAGS are honoured), and nothing else. Sources are
compiled side by side, as many as there are processors or as MAX_JOBS says.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
SOURCES = PACKAGE.parents[1] / "native"
LIBRARY = {"win32": "zoo_kernels.dll", "darwin": "libzoo_kernels.dylib"}.get(sys.platform, "libzoo_kernels.so")


class BuildError(RuntimeError):
    """The library could not be built; the message says why."""


def digest(sources: Path = SOURCES) -> str:
    """A short hash of all native sources, compiled into the library."""
    total = hashlib.sha256()
    for path in sorted([*sources.glob("*.h"), *sources.glob("*.cpp"), *sources.glob("common/*.cpp")]):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def _changed(path: Path) -> float:
    """When a source, or a header that it includes, was last changed; this file decides on flags and counts as one."""
    found, todo = {Path(__file__)}, [path]
    while todo:
        current = todo.pop()
        if current not in found:
            found.add(current)
            text = current.read_text(encoding="utf-8")
            todo += [(current.parent / name).resolve() for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE)]
    return max(source.stat().st_mtime for source in found)


def _machine() -> str:
    """x86_64, aarch64 or another name: what is compiled for (cibuildwheel crosses on macOS through ARCHFLAGS)."""
    flags = os.environ.get("ARCHFLAGS", "")
    name = flags.split()[-1] if flags else sysconfig.get_platform().rsplit("-", 1)[-1]
    name = name.lower()
    if name.endswith("x86_64"):  # linux-x86_64, macosx-..-x86_64
        name = "x86_64"
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def instruction_sets(msvc: bool) -> dict[str, list[str]]:
    """Flags for each instruction set of this platform."""
    sets: dict[str, list[str]] = {"baseline": []}
    if _machine() == "x86_64":
        if msvc:
            sets["avx2"] = ["/DZK_AVX2", "/arch:AVX2"]
            sets["avx512"] = ["/DZK_AVX512", "/arch:AVX512"]
        else:
            sets["avx2"] = ["-DZK_AVX2", "-mavx2", "-mfma", "-mf16c"]
            wide = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
            sets["avx512"] = ["-DZK_AVX512", "-mavx2", "-mfma", "-mf16c", *wide]
    elif _machine() == "aarch64":
        sets["neon"] = ["/DZK_NEON" if msvc else "-DZK_NEON"]
    return sets


def _compiler() -> tuple[Any, bool]:
    """The platform's compiler object and whether it is MSVC."""
    try:
        from distutils.ccompiler import new_compiler
        from distutils.sysconfig import customize_compiler

        import setuptools  # noqa: F401  (brings distutils along, also where Python no longer has it)
    except ImportError as error:
        raise BuildError(
            f"setuptools is needed to build the native library ({error}); pip install setuptools"
        ) from error
    compiler: Any = new_compiler()
    msvc = compiler.compiler_type == "msvc"
    if not msvc:
        customize_compiler(compiler)
        cxx = (os.environ.get("CXX") or "").split() or [
            next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "c++")
        ]
        if not shutil.which(cxx[0]):
            raise BuildError(f"no C++ compiler was found (looked for {cxx[0]}); install g++ or clang++, or set CXX")
        # The flags that Python itself was built with (-DNDEBUG -g -fwrapv ...) are of no use here.
        extra = os.environ.get("CXXFLAGS", "").split() + os.environ.get("ARCHFLAGS", "").split()
        compiler.set_executables(
            compiler=[*cxx, *extra],
            compiler_cxx=[*cxx, *extra],
            compiler_so=[*cxx, *extra],
            compiler_so_cxx=[*cxx, *extra],
            linker_so=[*cxx, "-shared", *extra, *os.environ.get("LDFLAGS", "").split()],
            linker_so_cxx=[*cxx, "-shared", *extra, *os.environ.get("LDFLAGS", "").split()],
        )
    return compiler, msvc


def compile_library(target: Path, *, work: Path, sources: Path = SOURCES, flags: list[str] | None = None) -> Path:
    """Build the library as ``target``; objects stay in ``work`` and are reused while nothing they include changed.

    ``flags``: further compiler and linker flags (a sanitizer). Raises BuildError.
    """
    if not sources.is_dir():
        raise BuildError(f"the native sources are not at {sources}; they are part of the repository and of the sdist")
    compiler, msvc = _compiler()
    if msvc:
        common = ["/O2", "/std:c++17", "/EHsc", "/MD"]
    else:
        common = [
            "-O3",
            "-std=c++17",
            "-fPIC",
            "-fvisibility=hidden",
            "-fno-math-errno",
            "-ffp-contract=off",  # the sources say fma where they mean it; results must not depend on the inlining
            "-Wall",
            "-Wno-maybe-uninitialized",
            "-Wno-uninitialized",
            "-pthread",
        ]
    common += flags or []
    jobs = [("common/" + path.name, ".", ["-DZK_ISA=common"]) for path in sources.glob("common/*.cpp")]
    for isa, special in instruction_sets(msvc).items():
        jobs += [(path.name, isa, [f"-DZK_ISA={isa}", *special]) for path in sources.glob("*.cpp")]
    stamp = f'-DZK_SOURCES="{digest(sources)}"'

    def compile_one(job: tuple[str, str, list[str]]) -> str:
        name, folder, special = job
        made = work / folder / Path(name).with_suffix(compiler.obj_extension)
        made.parent.mkdir(parents=True, exist_ok=True)
        # Sources in common/ carry the digest of all sources, so they are never old enough to keep.
        if folder == "." or not made.exists() or made.stat().st_mtime <= _changed(sources / name):
            args = [a.replace("-D", "/D", 1) if msvc and a.startswith("-D") else a for a in [*special, stamp]]
            compiler.compile([name], output_dir=str(work / folder), extra_preargs=[*common, *args])
        return str(made)

    here = os.getcwd()
    try:
        if msvc:
            compiler.initialize()  # before there are several threads
        os.chdir(sources)  # relative names keep distutils from mirroring the whole path below the output folder
        try:
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                objects = list(pool.map(compile_one, sorted(jobs)))
        finally:
            os.chdir(here)
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh_library = work / f"{os.getpid()}-{target.name}"
        linker = [] if msvc else ["-pthread", *(flags or [])]
        compiler.link_shared_object(objects, str(fresh_library), extra_postargs=linker, target_lang="c++")
        os.replace(fresh_library, target)  # a process that has the old one mapped keeps it
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{error}") from error
    except Exception as error:  # distutils' own errors: CompileError, LinkError
        raise BuildError(f"the compiler failed: {error}") from error
    return target


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zoo_kernels.build", description="Compile the native CPU library.")
    parser.add_argument(
        "--target", type=Path, default=PACKAGE / LIBRARY, help="where to put it (default: in the package)"
    )
    parser.add_argument("--flags", default="", help="further compiler and linker flags, such as -fsanitize=address")
    options = parser.parse_args(arguments)
    work = SOURCES.parent / "build" / ("native" + hashlib.sha256(options.flags.encode()).hexdigest()[:6])
    try:
        target = compile_library(options.target.resolve(), work=work, flags=options.flags.split())
    except BuildError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    (PACKAGE / "native_missing.txt").unlink(missing_ok=True)
    sys.stdout.write(f"built {target} for {', '.join(instruction_sets(sys.platform == 'win32'))}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
