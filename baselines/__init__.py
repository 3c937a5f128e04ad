"""The models that Infini-attention is compared with; they belong to the checkout, not to the wheel."""
