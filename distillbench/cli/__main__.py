"""`python -m distillbench.cli`, which is `distillbench` where no script is installed."""

from distillbench.cli.main import main

main()
