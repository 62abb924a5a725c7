"""Builds the compiled backend into the package: ``python extensions/build.py``, or ``make extension``.

One shared library against torch's stable ABI: built once, it loads in torch 2.11 and later and in any Python. It needs
nvcc, a torch (with or without CUDA) for its headers, and the pip package ``nvidia-cusparselt-cu13`` (or ``-cu12``) for
cuSPARSELt's. No GPU is needed to build.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "slope_pl" / "ops" / "slope_cuda.so"
KERNELS = (
    "operands/refresh.cu",
    "operands/markers.cu",
    "operands/metadata.cu",
    "resetup/choose.cu",
    "select/select.cu",
)
HOST = ("library.cpp", "hopper.cpp", "spmm/session.cpp")
# The oldest torch whose stable interface is used; a library built so loads in every later one.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
ARCHITECTURES = ("80", "90")
CUTLASS_KERNELS, CUTLASS_DTYPES = 3, 2  # of cutlass/instances.h
FUSED_KERNEL, FUSED_EPILOGUES = 1, (2, 3, 4, 5)  # likewise: numbers of Epilogue in cutlass/spmm_sm90.h


class BuildError(RuntimeError):
    """Something that the build needs is missing or failed; the message says what to do."""


def find_nvcc() -> Path:
    """Nvcc from CUDA_HOME, the PATH or /usr/local/cuda; torch's own search finds none beside a CPU torch."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in filter(None, candidates):
        if (Path(home) / "bin" / "nvcc").exists():
            return Path(home) / "bin" / "nvcc"
    found = shutil.which("nvcc")
    if found is None:
        raise BuildError("no nvcc: install the CUDA toolkit, or set CUDA_HOME to its folder")
    return Path(found).resolve()


def package_dirs() -> Iterator[Path]:
    """Folders that may hold the ``nvidia`` namespace package."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        yield Path(place)


def find_cusparselt() -> tuple[Path, Path]:
    """Folders of cusparseLt.h and libcusparseLt.so.0, from CUSPARSELT_HOME or the pip package in either layout.

    0.9 and later share ``nvidia/cu13`` with other packages, older ones have ``nvidia/cusparselt`` to themselves.
    """
    homes = [Path(os.environ["CUSPARSELT_HOME"])] if "CUSPARSELT_HOME" in os.environ else []
    homes += [place / name for place in package_dirs() for name in ("cu13", "cu12", "cusparselt")]
    for home in homes:
        if (home / "include" / "cusparseLt.h").exists() and (home / "lib" / "libcusparseLt.so.0").exists():
            return home / "include", home / "lib"
    raise BuildError(
        "no cuSPARSELt: pip install nvidia-cusparselt-cu13, or set CUSPARSELT_HOME to a folder with include/cusparseLt.h "
        f"and lib/libcusparseLt.so.0 (searched: {', '.join(map(str, homes)) or 'no nvidia packages are installed'})"
    )


def find_cutlass() -> Path | None:
    """Folder with CUTLASS's ``include``, from CUTLASS_HOME or the pip package ``nvidia-cutlass``; None without."""
    homes = [Path(os.environ["CUTLASS_HOME"])] if "CUTLASS_HOME" in os.environ else []
    spec = importlib.util.find_spec("cutlass_library")
    homes += [Path(place) / "source" for place in (spec.submodule_search_locations or [])] if spec else []
    return next((home for home in homes if (home / "include" / "cutlass" / "cutlass.h").exists()), None)


def cutlass_commands(nvcc: Path, home: Path, objects_dir: Path) -> list[tuple[list[str], Path]]:
    """The Hopper kernels: one compilation a kernel, epilogue and dtype, about a minute each, and their dispatch."""
    flags = ["-DNDEBUG", "-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr"]
    start = [str(nvcc), *flags, "-Xcompiler", "-fPIC,-fvisibility=hidden", "-c"]
    includes = [f"-I{home / 'include'}", f"-I{home / 'tools' / 'util' / 'include'}"]
    dispatch = objects_dir / "spmm_sm90.cu.o"
    commands = [([*start, str(HERE / "cutlass" / "spmm_sm90.cu"), "-o", str(dispatch)], dispatch)]
    plain: list[tuple[int, int | None]] = [(kernel, None) for kernel in range(CUTLASS_KERNELS)]
    for kernel, epilogue in plain + [(FUSED_KERNEL, epilogue) for epilogue in FUSED_EPILOGUES]:
        for dtype in range(CUTLASS_DTYPES):
            name = f"sm90_{kernel}_{dtype}" if epilogue is None else f"sm90_{kernel}_{dtype}_fused_{epilogue}"
            out = objects_dir / f"{name}.o"
            which = [f"-DSLOPE_SM90_KERNEL={kernel}", f"-DSLOPE_SM90_DTYPE={dtype}"]
            which += [] if epilogue is None else [f"-DSLOPE_SM90_EPILOGUE={epilogue}"]
            commands.append(([*start, *includes, *which, str(HERE / "cutlass" / "instance.cu"), "-o", str(out)], out))
    return commands


def find_torch() -> Path:
    """Folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("no torch in this environment: install it first, and build without isolation")
    return Path(next(iter(spec.submodule_search_locations)))


def cuda_includes(nvcc: Path) -> list[str]:
    """The toolkit's headers, then those of nvidia-cusparse if present (0.9.1 and older ask for cusparse.h), then ours."""
    includes = [nvcc.parent.parent / "include"]
    includes += [
        place / name / "include"
        for place in package_dirs()
        for name in ("cu13", "cusparse")
        if (place / name / "include" / "cusparse.h").exists()
    ]
    return [*(f"-I{path}" for path in includes), "-idirafter", str(HERE / "stub")]


def run(command: list[str]) -> None:
    """Run one compiler; what it prints is shown only if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"failed: {' '.join(command)}\n{done.stdout}{done.stderr}")


def _stamp_of(out: Path) -> Path:
    return out.with_suffix(".command")


def _is_current(out: Path, command: list[str]) -> bool:
    """Whether an object of the slow kernels is newer than all their sources and was made by the same command."""
    stamp = _stamp_of(out)
    if not out.exists() or not stamp.exists() or stamp.read_text() != " ".join(command):
        return False
    sources = [path for path in (HERE / "cutlass").glob("*.[ch]*") if not path.name.startswith("bench_")]
    return all(source.stat().st_mtime < out.stat().st_mtime for source in sources)


def build(target: Path = TARGET, architectures: tuple[str, ...] = ARCHITECTURES, jobs: int | None = None) -> Path:
    """Compile and link everything.

    Args:
        target: the shared library to write.
        architectures: compute capabilities of the own kernels, as in ``sm_90``; later ones run from PTX.
        jobs: compilers at a time.

    Returns:
        ``target``.

    Raises:
        BuildError: if something is missing or fails to compile.
    """
    nvcc, torch = find_nvcc(), find_torch()
    headers, library = find_cusparselt()
    objects_dir = HERE / "build"
    objects_dir.mkdir(exist_ok=True)
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    commands: list[list[str]] = []
    objects: list[Path] = []
    cutlass = find_cutlass()
    if cutlass is None:
        print(
            "without the CUTLASS kernels for narrow layers on Hopper: pip install nvidia-cutlass, or set CUTLASS_HOME"
        )
    else:
        print("the CUTLASS kernels take a few minutes ...", flush=True)
        for command, out in cutlass_commands(nvcc, cutlass, objects_dir):  # the slowest first
            objects.append(out)
            if not _is_current(out, command):
                commands.append(command)
    for source in KERNELS:
        out = objects_dir / (Path(source).stem + ".cu.o")
        commands.append(
            [str(nvcc), "-O3", "-std=c++17", *codes, "-Xcompiler", "-fPIC", "-c", str(HERE / source), "-o", str(out)]
        )
        objects.append(out)
    for source in HOST:
        out = objects_dir / (Path(source).stem + ".o")
        flags = [
            "-std=c++17",
            "-O2",
            "-Wall",
            "-fPIC",
            "-fvisibility=hidden",
            TORCH_TARGET,
            f"-fmacro-prefix-map={HERE}/=",
        ]
        if cutlass is not None:
            flags.append("-DSLOPE_WITH_SM90")
        includes = ["-isystem", str(torch / "include"), f"-I{headers}", *cuda_includes(nvcc)]
        commands.append(["g++", *flags, "-c", str(HERE / source), *includes, "-o", str(out)])
        objects.append(out)
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        list(pool.map(run, commands))
    for command in commands:
        _stamp_of(Path(command[command.index("-o") + 1])).write_text(" ".join(command))
    cudart = next(path for path in (nvcc.parent.parent / "lib64", nvcc.parent.parent / "lib") if path.exists())
    partial = target.with_suffix(".partial")
    # libtorch.so and not libtorch_cpu.so alone: on a CUDA torch it brings in the symbol of the current stream.
    torch_libraries = [f"-L{torch / 'lib'}", "-l:libtorch.so", "-l:libtorch_cpu.so"]
    others = [f"-L{library}", "-l:libcusparseLt.so.0", f"-L{cudart}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    run(["g++", "-shared", *map(str, objects), "-o", str(partial), "-Wl,--no-as-needed", *torch_libraries, *others])
    partial.replace(target)  # a process that has the old one loaded keeps it whole
    return target


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TARGET, help=f"the library to write (default: {TARGET})")
    parser.add_argument(
        "--arch",
        nargs="+",
        default=list(ARCHITECTURES),
        help="compute capabilities of the own kernels (default: 80 90)",
    )
    parser.add_argument("--jobs", type=int, help="compilers at a time (default: one a core)")
    args = parser.parse_args()
    try:
        print(f"built {build(args.output, tuple(args.arch), args.jobs)}")
    except BuildError as error:
        sys.exit(f"extensions/build.py: {error}")


if __name__ == "__main__":
    main()
