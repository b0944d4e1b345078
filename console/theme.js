// Before anything is painted: the theme that was chosen here, else the system's. A classic script, because modules run later.
try {
  const chosen = localStorage.getItem("portolan.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // A browser that keeps nothing for this page shows the system's theme.
}
