"""Dense recall: many short facts, each said once and asked for again and again."""
