"""Rounding floats to codes: to nearest, with searched scales, by AWQ and by GPTQ."""
