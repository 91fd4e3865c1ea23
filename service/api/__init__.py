"""The routes: what each reads of a request, asks of the adapters, and answers."""
