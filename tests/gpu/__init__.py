"""What only a GPU can show; every test here is skipped where there is none."""
