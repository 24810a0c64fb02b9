"""Launches that go straight to a compiled kernel, without Triton's look at every argument, constant and option.

The first launch of a kind takes Triton's own path, which compiles. What came out is kept by all that it was compiled
for, and later launches of the kind hand their arguments to its launcher.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Parameter

# Whose launch path and rules of specialising these are. Another version may compile for more than a key holds.
VERSIONS = ((3, 6), (3, 7))

# What a key holds of an argument that is no tensor. Of a tensor it holds the dtype, and 1 if it is aligned, or 0.
_ONE, _SIXTEENTH, _INTEGER, _LONG_SIXTEENTH, _LONG, _UNSIGNED_SIXTEENTH, _UNSIGNED, _FLOAT, _BOOL = range(
    -9, 0
)


def why_not_bound(version: str) -> str | None:
    """Return why launches take Triton's own path under this version of Triton, or None."""
    numbers = tuple(int(number) for number in version.split(".")[:2] if number.isdecimal())
    known = [f"{major}.{minor}" for major, minor in VERSIONS]
    return (
        None
        if numbers in VERSIONS
        else f"launches are bound under Triton {' and '.join(known)}, not {version}"
    )


class BoundLaunches:
    """The compiled kernels of one device function, each by the kind of launch that it serves.

    function: as `triton.jit` makes it.  varying: names of the arguments that it is not specialised on.
    """

    def __init__(self, function: Any, varying: frozenset[str]) -> None:
        import triton

        self._function = function
        self._binds = why_not_bound(triton.__version__) is None
        if self._binds:
            from triton import knobs
            from triton.runtime import JITFunction
            from triton.runtime import driver as drivers

            self._knobs, self._drivers = knobs, drivers
            self._binds = isinstance(function, JITFunction)  # the interpreter has no compiled kernels
        self._varies = tuple(name in varying for name in function.arg_names) if self._binds else ()
        self._driver: Any = None
        self._hip = False
        self._kernels: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """Launch the kernel of such arguments and constants; one that is not compiled yet, after compiling it."""
        if not self._binds or self._watched():
            self._compile(grid, arguments, constants)
            return
        driver = self._drivers.active
        if driver is not self._driver:
            self._kernels.clear()
            self._driver, self._hip = driver, driver.get_current_target().backend == "hip"
        device = driver.get_current_device()
        key: list[Any] = [device, self._knobs.runtime.debug, self._knobs.compilation.instrumentation_mode]
        passed: list[Any] = []
        for argument, varies in zip(arguments, self._varies, strict=False):
            kind = type(argument)
            if kind is int:
                if varies and -(2**31) <= argument < 2**31:
                    key.append(_INTEGER)
                elif 1 < argument < 2**31:
                    key.append(_INTEGER if argument & 15 else _SIXTEENTH)
                else:
                    key.append(_size(argument, varies))
            elif argument is None:
                key.append(None)
            elif kind is Tensor or kind is Parameter or issubclass(kind, Tensor):
                address = argument.data_ptr()
                key += argument.dtype, 0 if varies or address & 15 else 1
                if self._hip:
                    key.append(argument.untyped_storage().nbytes() < 2**31)
                # A tensor that is on no GPU is for the launcher to refuse; an address it takes as it is.
                passed.append(address if argument.get_device() >= 0 else argument)
                continue
            elif kind is float:
                key.append(_FLOAT)
            elif kind is bool:
                key.append(_BOOL)
            else:  # nothing that a kernel of ours takes
                self._compile(grid, arguments, constants)
                return
            passed.append(argument)
        if self._hip:
            key.append(self._knobs.amd.use_buffer_ops)
        key += constants
        key += constants.values()
        kind_of_launch = tuple(key)
        found = self._kernels.get(kind_of_launch)
        if found is None:
            compiled = self._compile(grid, arguments, constants)
            found = self._bound(compiled, len(arguments), constants)
            if found is not None:
                self._kernels[kind_of_launch] = found
            return
        run, function, metadata, rest = found
        size = len(grid)
        run(
            grid[0],
            grid[1] if size > 1 else 1,
            grid[2] if size > 2 else 1,
            driver.get_current_stream(device),
            function,
            metadata,
            None,
            None,
            None,
            *passed,
            *rest,
        )

    def _watched(self) -> bool:
        """Tell whether anything sees launches, or changes how kernels are compiled: all launches are then Triton's."""
        runtime = self._knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        # A chain that has no hooks yet sees nothing.
        return bool(
            getattr(enter, "calls", enter)
            or getattr(leave, "calls", leave)
            or self._function.pre_run_hooks
            or getattr(runtime, "add_stages_inspection_hook", None)
        )

    def _compile(self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        """Launch as Triton does, and return the compiled kernel; None if Triton keeps it for itself."""
        used = {name: getattr(value, "compiled", value) for name, value in constants.items()}
        return self._function[grid](*arguments, **used)

    def _bound(self, compiled: Any, given: int, constants: dict[str, Any]) -> tuple[Any, ...] | None:
        """Return what later launches of the kind need, or None if they cannot go without Triton.

        given: how many arguments come by place; all the others must be constants.
        """
        from triton.compiler import CompiledKernel

        parameters = self._function.params
        by_place, by_name = parameters[:given], parameters[given:]
        if (
            not isinstance(compiled, CompiledKernel)
            or self._function.used_global_vals
            or any(parameter.is_constexpr for parameter in by_place)
            or not all(parameter.is_constexpr for parameter in by_name)
            or any(value != value for value in constants.values())  # not a number: a key that is never found
        ):
            return None
        rest = []
        for parameter in by_name:
            value = constants.get(parameter.name, parameter.default)
            rest.append(getattr(value, "compiled", value))
        return compiled.run, compiled.function, compiled.packed_metadata, tuple(rest)


def _size(number: int, varies: bool) -> int:
    """Return what becomes of an integer: its type, and whether it is 1 or a multiple of 16 where that counts."""
    if -(2**31) <= number < 2**31:
        return _INTEGER if varies else _ONE if number == 1 else _INTEGER if number & 15 else _SIXTEENTH
    if number < 2**63:
        return _LONG if varies or number & 15 else _LONG_SIXTEENTH
    return _UNSIGNED if varies or number & 15 else _UNSIGNED_SIXTEENTH
