"""The train loop and what it needs: input pipeline, packing, losses, step, optimizer."""
