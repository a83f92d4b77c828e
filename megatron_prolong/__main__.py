"""`python -m megatron_prolong` is the `prolong` command; torchrun starts ranks this way."""

from megatron_prolong.cli.main import run

if __name__ == "__main__":
    run()
