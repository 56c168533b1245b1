"""Contestants of benchmarks without processes."""


class InThisProcess:
    """In place of a worker, which takes seconds to start."""

    requests: list[tuple[str, object]] = []

    def __init__(self, name: str, create, *arguments):
        self.name, self.respond = name, create(*arguments)

    def request(self, message):
        self.requests.append((self.name, message))
        return self.respond(message)

    def stop(self):
        pass
