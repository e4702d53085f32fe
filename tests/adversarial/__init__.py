"""The adversarial suite of the verifier: cheats that must be caught, look-alikes that must pass."""
