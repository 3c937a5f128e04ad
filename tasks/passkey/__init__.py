"""Passkey: find five digits that were said once in a long text (Landmark wording)."""
