"""The verifier: is a candidate correct, is it faster, and how far can the answer be believed?"""

from ttkit.verify.protocol import PROTOCOLS, Limits, Protocol
from ttkit.verify.verdict import Verdict
from ttkit.verify.verifier import Verifier

__all__ = ["PROTOCOLS", "Limits", "Protocol", "Verdict", "Verifier"]
