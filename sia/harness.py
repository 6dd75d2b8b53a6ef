"""Run lm-eval with the model "sia": `python -m sia.harness`, the same as `sia-eval`."""

from sia.integrations.lm_eval import SIA, main

__all__ = ["SIA", "main"]

if __name__ == "__main__":
    main()
