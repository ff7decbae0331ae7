"""Tests with KerasHub, in an environment of their own: `make test-hub`."""
