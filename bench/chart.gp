# How much more than tinyauth each proxy spends, row by row: a dot right of the line spends more. Drawn from results.tsv.
#   gnuplot -e "tsv='results.tsv'; svg='results.svg'; places=20" chart.gp

set terminal svg size 900,(110 + 26 * places) font "sans-serif,13" background rgb "white"
set output svg
set datafile separator tab
set datafile columnheaders
set datafile missing "-"

set label 1 "What each proxy spends where tinyauth spends 1" at screen 0.98, screen 1 - 20.0 / (110 + 26 * places) right font ",15"
set xlabel "times tinyauth's CPU time, delay or memory (logarithmic)"
set logscale x 2
set xrange [0.125:256]
set xtics ("1/8" 0.125, "1/4" 0.25, "1/2" 0.5, "1" 1, "2" 2, "4" 4, "8" 8, "16" 16, "32" 32, "64" 64, "128" 128, "256" 256)
set yrange [0.3:places + 0.7]
set grid xtics ytics lc rgb "#e4e4e4" lt 1
set border 1 lc rgb "#888888"
set tics nomirror scale 0 textcolor "#222222"
set tmargin 5
set key at screen 0.98, screen 1 - 46.0 / (110 + 26 * places) right horizontal maxrows 1 samplen 1 width 1
set arrow from 1, 0.3 to 1, places + 0.7 nohead lc rgb "#222222" lw 1.5 front

label(work, unit) = sprintf("%s, %s", work, unit)
spent(name) = 1.0 / column("tinyauth/" . name)

plot tsv index 0 using (spent("floor")):(column("place")):ytic(label(strcol("work"), strcol("unit"))) \
         with points pt 9 ps 1.1 lc rgb "#9a9a9a" title "bare relay", \
     tsv index 0 using (spent("nginx")):(column("place")) with points pt 7 ps 1.1 lc rgb "#0b7a3b" title "nginx tuned", \
     tsv index 0 using (spent("plain")):(column("place")) with points pt 6 ps 1.1 lw 2 lc rgb "#0b7a3b" title "nginx plain", \
     tsv index 0 using (spent("haproxy")):(column("place")) with points pt 5 ps 1.0 lc rgb "#1f5fbf" title "haproxy", \
     tsv index 0 using (spent("caddy")):(column("place")) with points pt 13 ps 1.3 lc rgb "#d1702a" title "caddy"
