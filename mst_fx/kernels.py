"""Inductor's C++ kernels: when their compilers run, so that Python and they need not wait for each other.

Facts this file rests on (seen on 2.11 and 2.13):
    * Inductor's generated module starts the compilers of all its kernels when it is loaded, which is after the whole
      graph has been lowered, and waits for them at its end.
    * Its functions look kernels up in the module's globals only when they run.
    * A kernel is known by its source and the compiler's flags: asked for twice, it is compiled once.
    * A set of vector instructions changes its own flags while it is probed. Probed by two threads it keeps some twice,
      and every kernel is compiled again in the next process.
"""

from __future__ import annotations

import ast
import contextlib
import os
import platform
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._inductor import cpu_vec_isa
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.codegen.wrapper import PythonWrapperCodegen

_waiting: list[tuple[AsyncCompile, dict[str, Any]]] = []
_at_once: list[bool] = []


@contextlib.contextmanager
def later() -> Iterator[None]:
    """Do not wait for a body's kernels: they compile while the next body and the outer graph are lowered."""
    if _at_once:
        yield
        return
    with mock.patch.object(AsyncCompile, "wait", lambda kernels, scope: _waiting.append((kernels, scope))):
        yield


def finish() -> None:
    """Wait for the kernels of bodies compiled so far; raises what a C++ compiler raised, when all have ended."""
    waiting = [*_waiting]
    _waiting.clear()
    failed: list[Exception] = []
    for kernels, scope in waiting:
        try:
            kernels.wait(scope)
        except Exception as e:
            failed.append(e)
    if failed:
        raise failed[0]


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Compile each body to the end before the next, so that an error is raised where the body is known."""
    _at_once.append(True)
    try:
        yield
    finally:
        _at_once.pop()


@contextlib.contextmanager
def early() -> Iterator[None]:
    """Start a kernel's compiler as soon as its source is written: it runs while the rest of the graph is lowered."""
    if get_compile_threads() <= 1:
        yield
        return
    define = PythonWrapperCodegen.define_kernel

    def start(wrapper: Any, name: str, source: str, *args: Any, **kwargs: Any) -> None:
        if source.startswith("async_compile.cpp_pybinding("):
            call = ast.parse(source.strip(), mode="eval").body
            assert isinstance(call, ast.Call)
            types, code = map(ast.literal_eval, call.args)
            CppPythonBindingsCodeCache.load_pybinding_async(types, code, submit_fn=AsyncCompile.submit)
        define(wrapper, name, source, *args, **kwargs)

    with mock.patch.object(PythonWrapperCodegen, "define_kernel", start):
        yield


def prepare() -> None:
    """Start in the background what Inductor asks the C++ compiler once per process, for Dynamo to trace meanwhile.

    That is which vector instructions work, where Inductor asks for one set after another (here side by side), and
    what its header comes to, with which every kernel is compiled. Torch keeps the answers, in the process and on disk;
    whoever asks for the vector instructions meanwhile waits. Torch's hash of its own sources is not asked for: it is
    made under a lock, which a forked process would find held. For the locks that are taken here, files' and imports',
    a fork waits until they are free.
    """
    if torch.cuda.is_available():
        return
    find = cpu_vec_isa.valid_vec_isa_list

    def wait() -> None:
        if threading.current_thread() is not thread:
            thread.join(_LONGEST_WAIT)

    def found_by_probes() -> list[cpu_vec_isa.VecISA]:
        wait()
        return find()

    def run() -> None:
        try:
            _prepare()
        finally:
            asked.stop()

    asked = mock.patch.object(cpu_vec_isa, "valid_vec_isa_list", found_by_probes)
    thread = threading.Thread(target=run, daemon=True)
    asked.start()
    thread.start()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=wait)


_LONGEST_WAIT = 60.0
"""Seconds that one waits for the probes, which take less than ten."""


def _prepare() -> None:
    with contextlib.suppress(Exception):  # whatever fails here fails again where it can be reported
        _probe_cpu()
        CppPythonBindingsCodeCache.load_pybinding_async(["const float*"], _NO_KERNEL, submit_fn=lambda compiler: None)


_NO_KERNEL = """// at::vec:: of a kernel's source has it compiled with the flags of vector instructions
extern "C" void kernel(const float* in) {}
"""


def _probe_cpu() -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        return
    present = cpu_vec_isa.x86_isa_checker()
    probes = [
        threading.Thread(target=bool, args=(isa,), daemon=True)
        for isa in cpu_vec_isa.supported_vec_isa_list
        if all(flag in present for flag in str(isa).split())
    ]
    for probe in probes:
        probe.start()
    for probe in probes:
        probe.join()
