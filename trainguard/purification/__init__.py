"""PBE: purify and audit models that are already trained (Mu et al., Progressive Backdoor Erasing, CVPR 2023)."""

from trainguard.purification.audit import audit
from trainguard.purification.commands import audit_checkpoint, purify_checkpoint
from trainguard.purification.progressive import purify
from trainguard.purification.results import AuditResult, PurifyResult

__all__ = ["AuditResult", "PurifyResult", "audit", "audit_checkpoint", "purify", "purify_checkpoint"]
