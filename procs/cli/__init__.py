"""``kata-runtime``: what an operator asks a running host.

One module per sub-command, each with a parser and a coroutine that asks the services over the bus; ``columns`` prints.
It reads and owns nothing. A service that is down is an error with a remedy and exit code 1, a wrong command line is 2.
"""
