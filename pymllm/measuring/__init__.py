"""The measurement of a loaded model: how fast it reads and answers, beside what the machine allows."""
