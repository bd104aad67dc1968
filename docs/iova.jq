# The events about one I/O virtual address: jq -c --arg iova 0xffd69000 -f iova.jq trace.jsonl
def n: ltrimstr("0x") | explode | reduce .[] as $c (0; . * 16 + $c - (if $c > 57 then 87 else 48 end));
($iova | n) as $a
| select((.virt_start != null and (.virt_start | n) <= $a and (.virt_end | n) >= $a)
      or (.iova != null and (.iova | n) <= $a and (.iova | n) + .len > $a)
      or (.address == $iova))
