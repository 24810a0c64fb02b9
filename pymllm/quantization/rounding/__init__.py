"""How floats become codes: nearest, by searched scales, by AWQ's, by GPTQ's."""
