/* Vector registers must survive a hooked call, with the upper halves in use and with
 * them clean; so must mask registers where there are any. Arguments: what is written to
 * (/dev/null), how often (1000). */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static unsigned long pattern[16][8], out[16][8];

/* The raw write site of libc, called by pointer so that the compiler keeps nothing live. */
static long (*volatile call)(int, const void *, unsigned long) = (long (*)(int, const void *, unsigned long))write;

static int sse(int fd)
{
	char b = 0;
	memset(out, 0, sizeof out);
	__asm__ volatile("movups 0(%[p]),%%xmm0\n movups 64(%[p]),%%xmm1\n movups 128(%[p]),%%xmm7\n movups 192(%[p]),%%xmm15\n"
			 "call *%[call]\n"
			 "movups %%xmm0,0(%[o])\n movups %%xmm1,64(%[o])\n movups %%xmm7,128(%[o])\n movups %%xmm15,192(%[o])\n"
			 : "+D"(fd)
			 : [p] "b"(pattern), [o] "r"(out), [call] "r"(call), "S"(&b), "d"(1L)
			 : "rax", "rcx", "r8", "r9", "r10", "r11", "memory", "cc", "xmm0", "xmm1", "xmm7", "xmm15");
	for (int i = 0; i < 4; i++)
		if (memcmp(out[i], pattern[i], 16))
			return 1;
	return 0;
}

__attribute__((target("avx"))) static int avx(int fd)
{
	char b = 0;
	memset(out, 0, sizeof out);
	__asm__ volatile("vmovups 0(%[p]),%%ymm0\n vmovups 64(%[p]),%%ymm1\n vmovups 128(%[p]),%%ymm7\n vmovups 192(%[p]),%%ymm15\n"
			 "call *%[call]\n"
			 "vmovups %%ymm0,0(%[o])\n vmovups %%ymm1,64(%[o])\n vmovups %%ymm7,128(%[o])\n vmovups %%ymm15,192(%[o])\n"
			 "vzeroupper\n"
			 : "+D"(fd)
			 : [p] "b"(pattern), [o] "r"(out), [call] "r"(call), "S"(&b), "d"(1L)
			 : "rax", "rcx", "r8", "r9", "r10", "r11", "memory", "cc", "xmm0", "xmm1", "xmm7", "xmm15");
	for (int i = 0; i < 4; i++)
		if (memcmp(out[i], pattern[i], 32))
			return 1;
	return 0;
}

/* Clean upper halves must still be clean: else later SSE code would merge into garbage. */
__attribute__((target("avx"))) static int upper_stay_zero(int fd)
{
	char b = 0;
	memset(out, 0xff, sizeof out);
	__asm__ volatile("vzeroupper\n call *%[call]\n vmovups %%ymm0,0(%[o])\n vmovups %%ymm9,64(%[o])\n vzeroupper\n"
			 : "+D"(fd)
			 : [o] "b"(out), [call] "r"(call), "S"(&b), "d"(1L)
			 : "rax", "rcx", "r8", "r9", "r10", "r11", "memory", "cc", "xmm0", "xmm9");
	return out[0][2] || out[0][3] || out[1][2] || out[1][3];
}

__attribute__((target("avx512f"))) static int avx512(int fd)
{
	char b = 0;
	unsigned mask = 0;
	memset(out, 0, sizeof out);
	__asm__ volatile("vmovups 0(%[p]),%%zmm3\n vmovups 64(%[p]),%%zmm20\n vmovups 128(%[p]),%%zmm31\n mov $0x5a5a,%%eax\n kmovw %%eax,%%k3\n"
			 "call *%[call]\n"
			 "kmovw %%k3,%[m]\n vmovups %%zmm3,0(%[o])\n vmovups %%zmm20,64(%[o])\n vmovups %%zmm31,128(%[o])\n vzeroupper\n"
			 : "+D"(fd), [m] "=&a"(mask)
			 : [p] "b"(pattern), [o] "r"(out), [call] "r"(call), "S"(&b), "d"(1L)
			 : "rcx", "r8", "r9", "r10", "r11", "memory", "cc", "xmm3");
	return memcmp(out[0], pattern[0], 64) || memcmp(out[1], pattern[1], 64) || memcmp(out[2], pattern[2], 64) ||
	       mask != 0x5a5a;
}

int main(int argc, char **argv)
{
	int fd = open(argc > 1 ? argv[1] : "/dev/null", O_WRONLY | O_CREAT, 0644), bad = 0;
	long rounds = argc > 2 ? atol(argv[2]) : 1000;
	for (int i = 0; i < 128; i++)
		((unsigned long *)pattern)[i] = 0x0123456789abcdefUL * (i + 1);
	for (long i = 0; i < rounds; i++) {
		bad += sse(fd);
		if (__builtin_cpu_supports("avx"))
			bad += avx(fd) + upper_stay_zero(fd);
		if (__builtin_cpu_supports("avx512f"))
			bad += avx512(fd);
		bad += sse(fd);
	}
	if (fd < 0)
		bad++;
	printf("vector: %d bad, avx %d, avx512 %d\n", bad, !!__builtin_cpu_supports("avx"), !!__builtin_cpu_supports("avx512f"));
	return bad != 0;
}
