"""What `quantize_model` reports: a row for every module that its rules name, replaced or not."""

from __future__ import annotations

from dataclasses import dataclass

MOST = 60  # characters of a reason in the table


@dataclass(frozen=True)
class QuantizedModule:
    """A report on one module that a rule names: what it has become, or why it stays as it is.

    prefix: its path; of stacked experts, that of the parameter.  kind: linear, embedding or experts; of a module that
    stays, the name of its class.
    method: what the rule asks for.  numerics: how the kernel's results differ, as in a plan.
    bytes_before, bytes_after: of the weight alone.  tied_to: the module whose packed tensors this one shares.
    calibration_rows: the number of inputs that its rounding was fitted to.
    parameters: elements of the weight; 0 where a row before this one counts them.
    share: what part that is of all parameters of the model that have two dimensions or more.
    reason: why the module stays in floats; None: it was replaced.
    """

    prefix: str
    kind: str
    rule: str
    method: str
    kernel: str
    numerics: str
    bytes_before: int
    bytes_after: int
    tied_to: str | None = None
    calibration_rows: int = 0
    parameters: int = 0
    share: float = 0.0
    reason: str | None = None

    @property
    def replaced(self) -> bool:
        """True if the module was replaced."""
        return self.reason is None


class QuantizationReport(list[QuantizedModule]):
    """The rows of all modules that rules have named, in order."""

    @property
    def share(self) -> float:
        """The part of the model's parameters with two dimensions or more that runs from replaced modules."""
        return sum(row.share for row in self if row.replaced)

    @property
    def unreached(self) -> list[QuantizedModule]:
        """The rows of modules that stay as they are, each with its reason."""
        return [row for row in self if not row.replaced]

    def __str__(self) -> str:
        lines = [("module", "kind", "method", "kernel or reason", "share")]
        for row in self:
            what = row.kernel if row.reason is None else f"stays: {row.reason}"
            shared = f"{row.share:.2%}" if row.parameters else f"with {row.tied_to}" if row.tied_to else ""
            lines.append((row.prefix, row.kind, row.method, _short(what), shared))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
        ]
        rows.append(f"{self.share:.2%} of the parameters with two dimensions or more are replaced")
        return "\n".join(row.rstrip() for row in rows)


def _short(text: str) -> str:
    return text if len(text) <= MOST else text[: MOST - 3] + "..."
