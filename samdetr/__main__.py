"""``python -m samdetr COMMAND ...``, for launchers that start modules."""

from samdetr.cli.main import main

main()
