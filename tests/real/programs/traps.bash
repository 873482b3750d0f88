# Builtins only: associative arrays, regular expressions, traps, timed reads.
trap 'u=$((u+1))' USR1; u=0; s=1
declare -A m
for ((i=1;i<=60000;i++)); do s=$(( (s*1103515245+12345)%2147483648 )); m[$((s%101))]+=${s:0:1}; [[ ${m[$((s%101))]} =~ 7+1 ]] && m[$((s%101))]=x
 if ((i%3000==0)); then kill -USR1 $$; read -t 0.01 x < /dev/zero; printf -v t '%(%Y)T' -1; echo "$i $s ${#m[@]} ${m[5]} $u"; fi; done
