"""Controls: SAEs that learned nothing, and rows in every table. A metric must tell trained SAEs from them."""
