"""The paper's Fig. 2."""
