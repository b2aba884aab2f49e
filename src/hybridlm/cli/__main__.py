"""`python -m hybridlm.cli`, the same as the `hybridlm` script."""

from hybridlm.cli import main

main()
