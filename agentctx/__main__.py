"""`python -m agentctx` is `agentctx`."""

from agentctx.cli.main import main

main()
