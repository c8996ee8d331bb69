"""Lets an engine use the matrix unit of Intel's CPUs (AMX), which a process has to ask for.

vLLM's attention uses AMX where the CPU has it, and leaves the asking to whatever else may do it
before: an engine none of whose libraries does dies of an illegal instruction at its first step.
Linux hands AMX out to a process and its forks, until they execute another program
(https://docs.kernel.org/arch/x86/xstate.html). vLLM imports a `worker_extension_cls` in the process
that computes, first of all.
"""

import ctypes
import platform

ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA = 158, 0x1023, 18
"""From Linux's asm/unistd_64.h, asm/prctl.h and asm/fpu/types.h, for x86-64."""

if platform.machine() == "x86_64":
    # Fails where there is no AMX: then vLLM does not use it.
    ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA)


class AMX:
    """A `worker_extension_cls` of vLLM's. It adds nothing: importing it is what helps."""


WORKER_EXTENSION = f"{AMX.__module__}.{AMX.__qualname__}"
"""As vLLM is told of it."""
